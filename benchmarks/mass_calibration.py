"""How well the attention mass that was kept tells right answers from wrong ones, and below which share to warn.

    fastkv-eval --model M --chat --task niah_single niah_multikey --length 1024 --policy full \\
        --policy fastkv:kv_retention=0.03,min_tokens=1 --policy fastkv-paper:kv_retention=0.1,min_tokens=1 \\
        --output M.jsonl
    python benchmarks/mass_calibration.py M.jsonl [FILE.jsonl …]

Of examples that the full cache answers right. The area under the ROC curve: how often a right answer has kept more than
a wrong one, of all pairs of them; 0.5 is chance. The threshold is the one that separates best on the even examples of
all files together, or the one that you name; what it does is told of both halves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from answers import read_answers

from fastkv.console.parser import Parser, guarded
from fastkv.errors import FastKVError, check_number


class Answer(NamedTuple):
    """share: of the attention mass that was kept, in [0, 1]. index: of the example."""

    share: float
    right: bool
    index: int


def roc_area(answers: Sequence[Answer]) -> float | None:
    """How often a right answer has kept more than a wrong one, ties counting half; None without both kinds."""
    right = [answer.share for answer in answers if answer.right]
    wrong = [answer.share for answer in answers if not answer.right]
    if not right or not wrong:
        return None
    return sum((r > w) + 0.5 * (r == w) for r in right for w in wrong) / (len(right) * len(wrong))


def warned(answers: Sequence[Answer], threshold: float) -> tuple[float, float]:
    """The shares of the wrong and of the right answers that are warned of."""

    def share(right: bool) -> float:
        low = [answer.share < threshold for answer in answers if answer.right == right]
        return sum(low) / max(1, len(low))

    return share(False), share(True)


def best_threshold(answers: Sequence[Answer]) -> float:
    """The share, in steps of 0.05, with the most of the wrong and the fewest of the right answers below it."""

    def gain(threshold: float) -> float:
        wrong, right = warned(answers, threshold)
        return wrong - right

    return max((step / 20 for step in range(1, 21)), key=gain)


def read(path: Path) -> list[Answer]:
    """The answers of a file of fastkv-eval. Raises FastKVError where it cannot be read or measured nothing."""
    records = read_answers(path)
    solved = {each["id"] for each in records if each["policy"] == "full" and each["score"] == 1}
    found = [
        Answer(each["attention_kept"], each["score"] == 1, each["index"])
        for each in records
        if each["id"] in solved and each["policy"] != "full" and each.get("attention_kept") is not None
    ]
    if not found:
        raise FastKVError(f"{path}: has no answer with attention_kept to an example that --policy full answers right")
    return found


def told(name: str, answers: Sequence[Answer], threshold: float) -> str:
    area, (wrong, right) = roc_area(answers), warned(answers, threshold)
    counts = f"{sum(answer.right for answer in answers)} of {len(answers)} right"
    shown = "none" if area is None else f"{area:.2f}"
    return (
        f"{name}: {counts}; ROC area {shown}; warned of {wrong:.0%} of the wrong and {right:.0%} of the right answers"
    )


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog="mass_calibration.py", description="How well the attention mass tells right from wrong.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="what fastkv-eval --output wrote")
    parser.add_argument("--threshold", type=float, metavar="R", help="share below which to warn (the best one)")
    args = parser.parse_args(argv)
    files = {str(path): read(path) for path in args.files}
    together = [each for answers in files.values() for each in answers]
    threshold = args.threshold
    if threshold is not None:
        check_number("threshold", threshold, 0, 1)
    else:
        threshold = best_threshold([each for each in together if each.index % 2 == 0])
    print(f"threshold {threshold:.2f}")
    if len(files) > 1:
        files["all"] = together
    for name, answers in files.items():
        for half, what in enumerate(("even examples", "odd examples")):
            print(told(f"{name}, {what}", [each for each in answers if each.index % 2 == half], threshold))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return guarded("mass_calibration.py", lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
