"""The answers that `fastkv-eval --output` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError

FIELDS = ("id", "policy", "score")  # which every answer has; a measurement of one may be missing or None


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Each answer as its fields. Raises FastKVError where the file cannot be read as one of fastkv-eval."""
    try:
        _, *answers = map(json.loads, file.read_text("utf-8").splitlines())
        missing = [field for answer in answers for field in FIELDS if field not in answer]
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(file, error) from None
    if missing or not all(isinstance(answer, dict) for answer in answers):
        raise _unreadable(file, f"an answer has no {missing[0]}" if missing else "an answer is no object")
    return answers


def _unreadable(file: Path, why: object) -> FastKVError:
    return FastKVError(f"{file}: is no file of fastkv-eval --output that can be read ({why})")
