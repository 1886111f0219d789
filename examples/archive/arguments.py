"""Command-line arguments with one clear line for every mistake, and exit status 2."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers of at least `low`, and at most `high` where one is given."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, not {value}")
        return value

    return read


def span(flag: str, values: list[int]) -> tuple[int, int]:
    """The lowest and the highest of a flag's one or two values. Raises ValueError for anything else."""
    if len(values) > 2 or values != sorted(values):
        raise ValueError(f"argument {flag}: must be one number, or a lower and a higher one, not {values}")
    return values[0], values[-1]


def number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A reader of finite numbers in [low, high], or in (low, high] where `above`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if math.isfinite(value) and value <= high and (value > low if above else value >= low):
            return value
        bounds = f"{'above' if above else 'at least'} {low:g}"
        if math.isfinite(high):
            bounds += f" and at most {high:g}"
        raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")

    return read
