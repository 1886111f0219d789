"""The answers that `fastkv-eval --output` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError

FIELDS = ("id", "policy", "task", "index", "score")  # which every answer has; one that was not measured may be missing


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Each answer as its fields. Raises FastKVError where the file cannot be read as one of fastkv-eval."""
    try:
        _, *answers = map(json.loads, file.read_text("utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    for number, answer in enumerate(answers, start=2):
        missing = [field for field in FIELDS if not isinstance(answer, dict) or field not in answer]
        if missing:
            raise _unreadable(file, f"line {number} has no {missing[0]}")
    return answers


def _unreadable(file: Path, why: object) -> FastKVError:
    return FastKVError(f"{file}: is no file of fastkv-eval --output that can be read ({why})")
