"""Makes the bundled model again, from nothing: draws archive texts, trains a small Llama on them, saves it.

    python train.py --minutes 120 --out trained

--digits gives the codes another length, and --weights begins with another model's weights.

Ctrl-C saves and ends; --resume goes on from there. The folder is a model that fastkv-run can load at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from arguments import Parser, integer, number, span
from encoding import MAX_DIGITS
from training_plan import HEAD_DIM, MAX_LENGTH, MIN_LENGTH, Budget, Settings

MINUTES = 120.0
INTERRUPTED = 130


def parser() -> Parser:
    """Options of the run itself have no default here, so that --resume can tell which were given."""
    known = Settings()
    made = Parser(description="Train the archive model, from nothing or on from --weights.")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "trained", help="folder (trained/)")
    made.add_argument("--minutes", type=number(0, above=True), help=f"length of the whole run ({MINUTES:g})")
    made.add_argument(
        "--steps", type=integer(1), help="length in steps; beside --minutes, the first to be over ends it"
    )
    made.add_argument("--stop-after", type=integer(1), metavar="STEPS", help="save and end after so many steps")
    made.add_argument("--resume", action="store_true", help="go on from the state in --out")
    made.add_argument("--weights", type=Path, metavar="FOLDER", help="begin with this model's weights")
    made.add_argument("--threads", type=integer(1), help="CPU threads (torch's choice)")
    made.add_argument(
        "--held-out", type=integer(1), default=50, metavar="TEXTS", help="texts a length, at the end (50)"
    )
    run = made.add_argument_group("settings of the run, kept over --resume")
    run.add_argument("--seed", type=integer(0), help=f"fixes weights and texts ({known.seed})")
    run.add_argument("--lr", type=number(0, 1, above=True), help=f"highest learning rate ({known.lr:g})")
    run.add_argument("--lengths", type=integer(MIN_LENGTH, MAX_LENGTH), nargs="+", help="in tokens (128 256 … 4096)")
    run.add_argument(
        "--digits", type=integer(1, MAX_DIGITS), nargs="+", help="of a code: a number, or the fewest and the most (4)"
    )
    run.add_argument("--batch-tokens", type=integer(1), help=f"tokens a step ({known.batch_tokens})")
    run.add_argument("--hidden", type=integer(1), help=f"hidden size, a multiple of {HEAD_DIM} ({known.hidden})")
    run.add_argument("--layers", type=integer(1), help=f"layers ({known.layers})")
    run.add_argument("--report-every", type=integer(1), metavar="STEPS", help=f"progress lines ({known.report_every})")
    return made


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line. Raises ValueError for those that do not go together."""
    given = {name: value for name in asdict(Settings()) if (value := getattr(args, name)) is not None}
    if "lengths" in given:
        given["lengths"] = tuple(sorted(set(args.lengths)))
    if "digits" in given:
        given["digits"] = span("--digits", args.digits)
    if args.hidden is not None and args.hidden % HEAD_DIM:
        raise ValueError(f"argument --hidden: must be a multiple of {HEAD_DIM}, not {args.hidden}")
    return given


def given_budget(args: argparse.Namespace) -> Budget | None:
    return None if args.minutes is None and args.steps is None else Budget(args.minutes, args.steps)


def start(args: argparse.Namespace) -> int:
    """Run as told; the exit status. Raises ValueError (FastKVError is one) or OSError for a user's mistake."""
    given = given_settings(args)
    # Only now the heavy imports: a mistake on the command line answers at once.
    import torch
    from training_loop import Run
    from training_state import MODEL, STATE, Counters, Record, read_record

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.resume:
        if args.weights is not None:
            raise ValueError("argument --weights: a run to resume has its own; leave it out")
        record = read_record(args.out)
        refuse_changes(record.settings, given)
        record = replace(record, budget=given_budget(args) or record.budget)
    else:
        refuse_overwriting(args.out, STATE, MODEL)
        record = Record(Settings(**given), given_budget(args) or Budget(MINUTES, None), Counters())
    run = Run(args.out, record.settings, record.budget, report)
    if args.resume:
        run.resume(record.counters)
        report(f"step {record.counters.step:5d}  resumed")
    elif args.weights is not None:
        run.begin_with(args.weights)
    interrupted = run.train(args.stop_after)
    report(f"step {run.counters.step:5d}  saved in {args.out}")
    if run.progress < 1:
        report("not over yet: --resume goes on from here")
        return INTERRUPTED if interrupted else 0
    run.test(args.held_out)
    return 0


def refuse_changes(saved: Settings, given: dict[str, Any]) -> None:
    """A resumed run keeps its settings; ValueError for one that is given anew and differs."""
    for name, value in given.items():
        if (kept := getattr(saved, name)) != value:
            flag = name.replace("_", "-")
            raise ValueError(f"argument --{flag}: the run to resume has {kept!r}, not {value!r}; leave it out")


def refuse_overwriting(folder: Path, state: str, model: str) -> None:
    """ValueError where a new run would write over a state or a model."""
    if (folder / state).exists():
        raise ValueError(f"{folder / state}: a run is there already; --resume goes on with it, or take another --out")
    if (folder / model).exists():
        raise ValueError(f"{folder / model}: a model is there already; take another --out")


def report(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    try:
        return start(made.parse_args(arguments))
    except (ValueError, OSError) as error:
        made.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        report("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
