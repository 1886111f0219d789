"""The importance of each KV head, from a file, and what budgets follow from it (HeadKV, arXiv 2410.19258)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, brief, cut
from fastkv.storage import is_odd

Table = tuple[tuple[float, ...], ...]  # layer, then KV head
Budgets = tuple[tuple[int, ...], ...]


def read_table(source: str | PathLike[str] | Sequence[Sequence[float]]) -> Table:
    """The scores of a JSON file ({"scores": [[…], …], …}) or of nested sequences: at least 0, not all of them 0.

    Raises FastKVError for anything else.
    """
    where = f"head_scores {cut(str(source), 200)}" if isinstance(source, (str, PathLike)) else "head_scores"
    layers = _from_file(Path(source), where) if isinstance(source, (str, PathLike)) else source
    if not _is_list(layers) or not layers or not all(_is_list(heads) and heads for heads in layers):
        raise FastKVError(
            f"{where}: must be a list for each layer, with a number for each KV head", setting="head_scores"
        )
    if len({len(heads) for heads in layers}) != 1:
        raise FastKVError(f"{where}: its layers differ in their number of heads", setting="head_scores")
    wrong = next((score for heads in layers for score in heads if not _is_score(score)), None)
    if wrong is not None:
        raise FastKVError(
            f"{where}: scores must be numbers of at least 0, not {brief(wrong, 40)}", setting="head_scores"
        )
    if not any(map(any, layers)):
        raise FastKVError(f"{where}: all scores are 0, so no head matters more than another", setting="head_scores")
    return tuple(tuple(float(score) for score in heads) for heads in layers)


def _from_file(path: Path, where: str) -> Any:
    if is_odd(path):
        raise FastKVError(f"{where}: cannot be read, for it is no ordinary file", setting="head_scores")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FastKVError(f"{where}: cannot be read ({error.strerror})", setting="head_scores") from None
    except (ValueError, RecursionError):
        raise _no_table(f"{where}: is no JSON") from None
    if not isinstance(content, dict) or "scores" not in content:
        raise _no_table(f"{where}: has no scores")
    return content["scores"]


def _no_table(why: str) -> FastKVError:
    return FastKVError(f"{why}; `fastkv-eval head-scores` makes such a file", setting="head_scores")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_score(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not value < 0 and value <= sys.float_info.max


def share_out(table: Table, beta: float, mean: int, most: int) -> Budgets:
    """Whole budgets of each layer and head, together `mean` a head, none above `most`.

    Each head has (1 - 1 / beta) of the mean; the rest is shared in proportion to the table. A layer's total is a
    multiple of its number of heads.
    """
    n_heads = len(table[0])
    if mean >= most:
        return ((most,) * n_heads,) * len(table)
    base = (1 - 1 / beta) * mean
    pool = mean / beta * len(table) * n_heads
    largest = max(map(max, table))  # in relation to it, so that no sum of scores overflows
    shares = _fill(pool, [score / largest for heads in table for score in heads], most - base)
    budgets = [[base + share for share in shares[i : i + n_heads]] for i in range(0, len(shares), n_heads)]
    means = _whole([sum(heads) / n_heads for heads in budgets], mean * len(table), most)
    return tuple(tuple(_whole(heads, n_heads * one, most)) for heads, one in zip(budgets, means, strict=True))


def _fill(pool: float, weights: list[float], room: float) -> list[float]:
    """Share a pool in proportion to weights, none getting more than `room`: what one leaves goes to the others.

    Where only heads of weight 0 have room, they share alike.
    """
    given = [0.0] * len(weights)
    nothing = 1e-9 * room
    while pool > nothing:
        open_ = [i for i, share in enumerate(given) if room - share > nothing]
        if not any(weights[i] for i in open_):
            weights = [1.0] * len(weights)
        total, wanted = sum(weights[i] for i in open_), pool
        for i in open_:
            # The quotient first: a pool times a very small weight could be zero, and nothing would ever be given.
            share = min(wanted * (weights[i] / total), room - given[i])
            given[i] += share
            pool -= share
    return given


def _whole(shares: Sequence[float], total: int, most: int) -> list[int]:
    """Whole numbers near the shares, in [0, most], with that total: the largest differences give way first."""
    whole = [min(int(share), most) for share in shares]
    while sum(whole) != total:
        step = 1 if sum(whole) < total else -1
        movable = [i for i, count in enumerate(whole) if 0 <= count + step <= most]
        i = max(movable, key=lambda i: step * (shares[i] - whole[i]))
        whole[i] += step
    return whole
