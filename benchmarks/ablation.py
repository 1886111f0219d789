"""What each part of FastKV's scores, budgets and context reduction brings: one page, from one command.

    python benchmarks/ablation.py FOLDER --model SMOLLM2 --task niah_single niah_14digits niah_multikey --length 1024
    python benchmarks/ablation.py FOLDER --model QWEN --task niah_multikey vt --length 2048

Asks the same texts under FastKV, under FastKV with one setting at a time as in the paper, under the paper's own, other
budgets, other shares of the propagated tokens, and two other methods. Prompts end with the beginning of the answer
(lead) and with the question (as in a chat), where the model has a chat template. Every answer is kept in FOLDER, one
file of `fastkv-eval` for each model, task, length and prompt end, so that each may have its own number of examples; the
same command continues, and prints one table of all that FOLDER holds.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from answers import read_answers

from fastkv.console.markdown import markdown
from fastkv.console.parser import Parser, guarded
from fastkv.eval.cli import main as fastkv_eval

# Name in the table -> policy as --policy takes it. A row differs from `fastkv` in what its name says, and no more; but
# claa and snapkv are methods of their own, with the paper's scores.
POLICIES = {
    "full": "full",
    "fastkv": "fastkv",
    "the paper's scores": "fastkv-paper",
    "queries=sum": "fastkv:queries=sum",
    "pooling=max": "fastkv:pooling=max",
    "pooling=forward alone": "fastkv:narrow=0",
    "reach=8": "fastkv:reach=8",
    "window=8": "fastkv:window=8",
    "window=32": "fastkv:window=32",
    "values=no": "fastkv:values=no",
    "sinks=0": "fastkv:sinks=0",
    "share=0": "fastkv:share=0",
    "heads compete": "fastkv-ada",
    "claa": "claa",
    "TSP by the window alone": "fastkv:tsp_window=0",
    "TSP off": "fastkv:tsp_rate=1",
    "TSP 10 %": "fastkv:tsp_rate=0.1",
    "5 % kept": "fastkv:kv_retention=0.05",
    "20 % kept": "fastkv:kv_retention=0.2",
    "5 % kept, look-ahead": "fastkv:kv_retention=0.05,lookahead=8",
    "snapkv": "snapkv",
}
ENDS = {"lead": [], "question": ["--no-lead"]}


def policy_text(text: str) -> str:
    """The policy without a floor, so that a short prompt keeps the same share as a long one."""
    return text if text == "full" else f"{text}{',' if ':' in text else ':'}min_tokens=1"


def file_of(folder: Path, model: str, task: str, length: int, end: str) -> Path:
    return folder / f"{Path(model).resolve().name}, {task} {length:,} {end}.jsonl"


def ask(args: Namespace, task: str, length: int, end: str) -> int:
    """One run of fastkv-eval, or what is missing of it."""
    policies = [word for text in POLICIES.values() for word in ("--policy", policy_text(text))]
    chat = ["--chat"] if args.chat else []
    output = file_of(args.folder, args.model, task, length, end)
    words = ["--model", args.model, "--task", task, "--length", str(length), "--examples", str(args.examples)]
    words += ["--seed", str(args.seed), "--dtype", args.dtype, "--output", str(output), *chat, *ENDS[end], *policies]
    if args.max_tokens is not None:
        words += ["--max-tokens", str(args.max_tokens)]
    return fastkv_eval(words)


def columns(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """A heading for each file, and the mean scores by policy of the examples that every setting has answered."""
    for file in sorted(folder.glob("*.jsonl")):
        examples: dict[str, dict[str, float]] = {}  # id -> policy -> score
        for record in read_answers(file):
            examples.setdefault(record["id"], {})[record["policy"]] = record["score"]
        asked = max(map(len, examples.values()), default=0)
        done = [scores for scores in examples.values() if len(scores) == asked]
        if done:
            yield f"{file.stem} ({len(done)})", {p: fmean(scores[p] for scores in done) for p in done[0]}


def table(folder: Path) -> str:
    """Right answers in %: a row for each setting, a column for each model, length, prompt end and task."""
    found = dict(columns(folder))
    if not found:
        return "Nothing has been answered yet.\n"
    rows = []
    for name, text in POLICIES.items():
        scores = [of_column.get(policy_text(text)) for of_column in found.values()]
        if any(score is not None for score in scores):
            rows.append([name, *("" if score is None else f"{100 * score:.1f}" for score in scores)])
    return markdown(["", *found], rows)


def main() -> int:
    args = _parser().parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for length in args.length:
        for end in ENDS if args.chat else ["lead"]:
            for task in args.task:
                status = ask(args, task, length, end)
                if status:
                    return status
    print(table(args.folder))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="ablation.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the answers; the same one continues")
    parser.add_argument("--model", required=True, metavar="PATH")
    parser.add_argument("--task", nargs="+", required=True, metavar="NAME", help="as fastkv-eval has them")
    parser.add_argument("--length", nargs="+", type=int, default=[1024], metavar="N", help="tokens of a prompt (1024)")
    parser.add_argument("--examples", type=int, default=1, metavar="N", help="of each task, length and depth (1)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (the task's own)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="fixes every text (0)")
    parser.add_argument("--dtype", default="float32", metavar="T", help="float32, bfloat16 or float16 (float32)")
    parser.add_argument("--no-chat", dest="chat", action="store_false", help="for a model without a chat template")
    return parser


if __name__ == "__main__":
    sys.exit(guarded("ablation.py", main))
