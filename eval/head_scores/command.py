"""fastkv-eval head-scores: the table of retrieval-head scores that policy headkv reads.

It has the model copy answers out of generated texts, counts how often each head looks at the token that is being copied
(retrieval.py), prints the strongest heads and writes the table as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from fastkv.cache.policies import FullKV
from fastkv.console.files import check_own_file, write_whole
from fastkv.console.machine import fingerprint, machine
from fastkv.console.markdown import markdown
from fastkv.console.parser import DONE
from fastkv.console.progress import ProgressLine
from fastkv.console.words import counted
from fastkv.engine.llm import LLM
from fastkv.errors import FastKVError, writable
from fastkv.eval.head_scores import retrieval
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.run import load, plan_of
from fastkv.eval.runner import Plan, Runner

KIND = "fastkv-head-scores"
SHOWN = 10  # rows of the table, at most
RETRIEVAL_HEAD = 0.1  # a query head with a score above this is a retrieval head in arXiv 2404.15574
FEW = 0.5  # of the copied tokens
TOO_FEW = "A model that chooses so few of them itself hardly shows how it copies: take shorter texts or another task.\n"


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    check_own_file(args.output, KIND)
    llm, folder = load(args)
    plan = plan_of(args, llm.config.context_length)
    with ProgressLine(None if args.quiet else sys.stderr) as progress:
        needles, left_out = _needles(llm, plan, args.chat, progress)
        parts = []
        for done, needle in enumerate(needles):
            progress.show(f"copying: {done} of {counted(len(needles), 'prompt')}", done, len(needles))
            parts.append(retrieval.watch_copying(llm, needle))
    scores = retrieval.head_scores(parts, llm.config.n_kv_heads)
    if not scores.kv_heads.any():
        raise FastKVError(
            f"in {counted(len(needles), 'example')} no head ever attended most to the token being copied, so there is "
            f"nothing to tell heads apart by, and {args.output} was not written; try shorter texts or another task"
        )
    # Nothing in it changes from one run of the same command on the same machine to the next.
    content = {
        "kind": KIND,
        "model": model_name(args.model),
        "files": fingerprint(folder),
        "tasks": [task.name for task in plan.tasks],
        "lengths": plan.lengths,
        "depths": plan.depths,
        "examples": plan.examples,
        "seed": plan.seed,
        "chat": args.chat,
        "measured": len(needles),
        "left_out": left_out,
        "said": scores.predicted,
        **machine(llm),
        "scores": scores.kv_heads.tolist(),
        "query_heads": scores.query_heads.tolist(),
    }
    write_whole(args.output, json.dumps(content) + "\n", "output")
    print(table(scores), end="")
    if left_out:
        total = len(needles) + left_out
        why = "their answer's tokens do not stand in the prompt exactly once"
        print(f"{left_out} of {counted(total, 'example')} {'was' if left_out == 1 else 'were'} left out: {why}.")
    return DONE


def _needles(llm: LLM, plan: Plan, chat: bool, progress: ProgressLine) -> tuple[list[retrieval.Needle], int]:
    """The examples of a plan, and how many of them had to be left out. All is checked before the model runs."""
    runner, slots = Runner(llm, plan, [PolicySpec("full", FullKV())], chat), plan.slots()
    needles = []
    for done, slot in enumerate(slots):
        progress.show(f"writing: {done} of {counted(len(slots), 'prompt')}", done, len(slots))
        question = runner.question(slot)
        example = question.example
        continued = runner.prompts.ids(replace(example, lead=f"{example.lead} {example.answers[0]}"))
        needle = retrieval.find_needle(question.ids, continued)
        needles += [] if needle is None else [needle]
    if not needles:
        raise FastKVError(
            f"in none of the {len(slots)} examples do the answer's tokens stand in the prompt exactly once, so none "
            "can be copied: this model's tokenizer writes an answer otherwise after the prompt than inside it; take "
            "another task" + (", or leave --chat out" if chat else "")
        )
    return needles, len(slots) - len(needles)


def model_name(model: str) -> str:
    """A folder's name, or a hub id as it is."""
    folder = Path(model).expanduser()
    return writable(folder.resolve().name if folder.is_dir() else model)


def table(scores: retrieval.HeadScores) -> str:
    """The KV heads with the highest scores, highest first, and how much of all scores is theirs: some are above 0."""
    n_kv_heads = scores.kv_heads.shape[1]
    flat = scores.kv_heads.flatten()
    order = flat.argsort(descending=True, stable=True).tolist()
    of_groups = scores.query_heads.unflatten(1, (n_kv_heads, -1)).flatten(0, 1).tolist()  # [L * Hkv][G]
    rows = [
        [
            *map(str, divmod(head, n_kv_heads)),
            f"{flat[head]:.3f}",
            " ".join(f"{score:.3f}" for score in of_groups[head]),
            f"{100 * flat[order[: rank + 1]].sum() / flat.sum():.1f} %",
        ]
        for rank, head in enumerate(order[:SHOWN])
        if flat[head] > 0
    ]
    above = int((scores.query_heads > RETRIEVAL_HEAD).sum())
    nothing = int((flat == 0).sum())
    return (
        f"{markdown(['layer', 'KV head', 'score', 'of its query heads', 'of all scores, up to here'], rows)}\n"
        "score: the share of the copied tokens to which a head attended more than to any other token, while they were\n"
        "being copied; of a KV head the mean over its query heads. Means over the examples.\n"
        f"Of {scores.query_heads.numel()} query heads {above} have a score above {RETRIEVAL_HEAD}; "
        f"of {len(flat)} KV heads {nothing} have none.\n"
        f"Given those before it, {100 * scores.predicted:.1f} % of these tokens were the model's own choice.\n"
        + (TOO_FEW if scores.predicted < FEW else "")
    )
