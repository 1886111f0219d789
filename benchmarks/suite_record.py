"""What a suite of measurements writes: a JSON file and a text, both written anew after every figure."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any


class Record:
    """Figures and lines of one run. about: what all of them belong to."""

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self._json, self._text = folder / f"{name}.json", folder / f"{name}.txt"
        self.entries: list[dict[str, Any]] = []
        self._text.write_text("", encoding="utf-8")
        for key, value in about.items():
            self.say(f"{key}: {value}")
        self._save()

    def say(self, line: str) -> None:
        """A line for people, at once."""
        print(line, flush=True)
        with self._text.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def add(self, step: str, case: str, status: str, **values: Any) -> None:
        """A figure, or why there is none. status: done, skipped, does not fit, failed, or running for what comes."""
        self.entries.append({"step": step, "case": case, "status": status, **values})
        shown = [f"{key} {_text(value)}" for key, value in values.items() if not isinstance(value, (list, dict))]
        self.say(f"{step} | {case} | {status}: {', '.join(shown)}")
        self._save()

    def figure(self, step: str, case: str, key: str) -> Any:
        """A value of what is done, or None."""
        found = [each.get(key) for each in self.entries if (each["step"], each["case"]) == (step, case)]
        return found[-1] if found else None

    def _save(self) -> None:
        fresh = self._json.with_suffix(".part")
        fresh.write_text(json.dumps({**self.about, "figures": self.entries}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self._json)  # a run that is stopped between two writes leaves the one before


class Warnings(logging.Handler):
    """Says the engine's warnings as lines of the record: why graphs are off, why attention is slow."""

    def __init__(self, record: Record) -> None:
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        self._record.say(f"warning: {record.getMessage()}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
