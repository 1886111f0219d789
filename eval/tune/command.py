"""fastkv-eval tune: the settings of FastKV for one model, found on needles hidden in the user's own texts.

Half of the needles choose the settings (search.py), the other half tell what they are worth. Nothing is written before
both is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastkv.cache.policies import FastKV
from fastkv.console.machine import fingerprint, machine
from fastkv.console.parser import DONE
from fastkv.console.policy_file import remember, write_policy_file
from fastkv.console.progress import ProgressLine
from fastkv.console.prompt import read_prompt
from fastkv.engine.llm import LLM
from fastkv.engine.plan import position_limit
from fastkv.errors import FastKVError, writable
from fastkv.eval.head_scores.command import model_name
from fastkv.eval.run import load
from fastkv.eval.tune.needle import EASIEST, KINDS, LONGEST, Kind, Needle, Needles, finds
from fastkv.eval.tune.report import Outcome, report, tsp
from fastkv.eval.tune.search import Trial, search, tsp_settings
from fastkv.storage import check_cache_folder

LENGTH, EXAMPLES, LOSS = 1024, 40, 5.0
PROBES = 2  # needles of a kind that show whether the model copies such codes at all
FEWEST = 8  # needles to choose by, and to report on


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    check_cache_folder()
    texts = [read_prompt(name) for name in args.prompt or []]
    llm, folder = load(args)
    if args.output is not None and args.output.resolve().parent == folder.resolve():
        raise FastKVError(f"{args.output}: would be one of the model's files; name another folder", setting="output")
    length = _length(llm, args.length)
    loss = LOSS if args.loss is None else args.loss
    with ProgressLine(None if args.quiet else sys.stderr) as progress:
        drawing = Needles(llm, texts, length, args.seed or 0)
        needles, asked = collect(drawing, args.examples or EXAMPLES, progress)
        choosing, held_out = halves(needles)
        tokens = max(len(needle.ids) for needle in needles)

        def show(policy: FastKV, done: int, total: int) -> None:
            progress.show(f"{_words(policy)}: {done} of {total} needles", done, total)

        def right(needle: Needle, policy: FastKV) -> bool:
            return finds(llm, needle, policy)

        trial = Trial(choosing, right, show)
        base = FastKV(min_tokens=1)
        best = search(trial, base, tsp_settings(base, llm.config, tokens), int(loss * len(choosing) / 100))
        # Never fewer tokens than were tried: a share of a shorter prompt would be.
        settings = _settings(best, llm.config.n_layers, tokens)
        tuned = FastKV(**settings)
        scores = []
        for name, policy in (("tuned", tuned), ("defaults", FastKV())):
            found = []
            for done, needle in enumerate(held_out):
                progress.show(f"{name}: {done} of {len(held_out)} needles", done, len(held_out))
                found.append(float(right(needle, policy)))
            scores.append(found)
    outcome = Outcome(settings, loss, len(needles), asked, tokens, len(choosing), trial.tried, scores[0], scores[1])
    print(report(outcome), flush=True)
    content = _content(args, llm, folder, outcome)
    if args.output is not None:
        write_policy_file(args.output, content, "output")
        print(f"written to {writable(str(args.output))}, for --policy-file")
    kept = writable(str(remember(content)))
    print(f"remembered in {kept}: fastkv-run takes it for this model; --policy fastkv for the defaults")
    return DONE


def collect(drawing: Needles, wanted: int, progress: ProgressLine) -> tuple[list[Needle], int]:
    """Needles that the full cache finds, in turn of each kind of which it finds any, and how many were asked for that.

    Raises FastKVError where there are too few.
    """
    asked = 0
    found: list[Needle] = []

    def draw(kind: Kind, index: int) -> bool:
        nonlocal asked
        progress.show(f"full cache: {len(found)} of {wanted} needles found", len(found), wanted)
        asked += 1
        needle = drawing.draw(kind, index)
        found.extend([] if needle is None else [needle])
        return needle is not None

    kinds: list[Kind] = []
    for kind in (*KINDS, *EASIEST):
        if not found or kind in KINDS:
            hits = [draw(kind, index) for index in range(PROBES)]
            kinds += [kind] * any(hits)
    for kind, index in ((kind, index) for index in range(PROBES, 3 * wanted) for kind in kinds):
        if len(found) < wanted and asked < 3 * wanted:
            draw(kind, index)
    if len(found) < 2 * FEWEST:
        raise FastKVError(
            f"the full cache finds {len(found)} of {asked} needles, and at least {2 * FEWEST} are needed to choose by: "
            "take shorter prompts (--length) or other texts (--prompt)"
        )
    return found, asked


def halves(needles: Sequence[Needle]) -> tuple[list[Needle], list[Needle]]:
    """Every other needle of each kind, and the others."""
    ordered = sorted(needles, key=lambda needle: str(needle.kind))  # stable: in each kind the order of drawing
    return ordered[::2], ordered[1::2]


def _length(llm: LLM, wanted: int | None) -> int:
    """Tokens of a prompt. Raises FastKVError where prompt and answer do not fit the model."""
    context = llm.config.context_length
    length = min(LENGTH, context - LONGEST) if wanted is None else wanted
    limit = position_limit(llm.config, FastKV(), max(1, min(length, context)))
    if length + LONGEST > limit:
        raise FastKVError(
            f"{length} tokens and an answer of up to {LONGEST} are beyond the {limit} that the model reads",
            setting="length",
        )
    return length


def _settings(best: FastKV, n_layers: int, tokens: int) -> dict[str, Any]:
    """Those that were chosen. Where TSP is off, its layer means nothing."""
    layer = {} if best.tsp_rate == 1 else {"tsp_layer": best.tsp_layer_of(n_layers)}
    kept = {"kv_retention": best.kv_retention, "min_tokens": best.budget(0, n_layers, tokens)}
    return {**kept, "reach": best.reach, **layer, "tsp_rate": best.tsp_rate}


def _words(policy: FastKV) -> str:
    return f"TSP {tsp(policy)}, reach {policy.reach}, {100 * policy.kv_retention:g} % kept"


def _content(args: argparse.Namespace, llm: LLM, folder: Path, outcome: Outcome) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "model": model_name(args.model),
        "files": fingerprint(folder),
        "policy": "fastkv",
        "settings": outcome.settings,
        "loss": outcome.loss,
        "tokens": outcome.tokens,
        "prompts": [writable(Path(name).name) for name in args.prompt or []],
        "seed": args.seed or 0,
        "chosen_on": outcome.chosen_on,
        "held_out": len(outcome.tuned),
        "found": sum(outcome.tuned),
        "found_by_defaults": sum(outcome.defaults),
        **machine(llm),
    }
