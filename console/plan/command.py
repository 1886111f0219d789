"""fastkv-plan: whether a request fits on machines that are not here, how long it would take, and what to change.

The plan, and nothing else, goes to stdout. Heavy imports wait until the arguments are known to be good. A plan that
does not fit is an answer: exit status 0, with --check 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.cache.catalogue import SETTINGS
from fastkv.cache.decode_budget import DecodeBudget
from fastkv.console.parser import DONE, FAULT, check_stdout, guarded, write_utf8
from fastkv.console.plan.flags import NAMED_SETTINGS, build_parser
from fastkv.console.policy_file import read_policy_file, remembered_policy
from fastkv.console.policy_text import build_policy
from fastkv.console.prompt import is_broken
from fastkv.console.run_flags import given_flags
from fastkv.errors import FastKVError, check_choice, check_integer, writable
from fastkv.kernels.packing import KV_DTYPES

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.console.plan.model import Shape

NAME = "fastkv-plan"
_MOST_GPUS = 4096


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault (or, with --check, no fit), 2 a mistake, 130."""
    return guarded(NAME, lambda: _run(build_parser().parse_args(argv)), NAMED_SETTINGS)


def _run(args: argparse.Namespace) -> int:
    _check(args)
    check_stdout()

    import torch

    from fastkv.console.plan.answer import answer_of
    from fastkv.console.plan.document import as_json
    from fastkv.console.plan.machine import device_of, machine_of
    from fastkv.console.plan.model import shape_of
    from fastkv.console.plan.text import lines
    from fastkv.engine.planning.planned import Wanted, planned

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = device_of(args)
    shape = shape_of(args.model, args.revision)
    policy, dtype = _policy(args, shape), shape.dtype(args.dtype, device)
    plan = planned(
        Wanted(
            config=shape.config,
            policy=policy,
            n_tokens=args.context,
            dtype=dtype,
            device=device,
            max_tokens=args.max_tokens,
            batch=args.batch,
            ranks=args.gpus,
            weights=args.weights,
            kv_dtype=args.kv_dtype,
            decode_budget=None if args.decode_budget is None else DecodeBudget(args.decode_budget),
            folder=shape.folder if shape.has_weights else None,
            threads=torch.get_num_threads(),
        )
    )
    machine = machine_of(args, device, dtype)
    if args.check and machine.memory is None:
        raise FastKVError("--check: how much memory there is is not known: give --memory")
    answer = answer_of(plan, machine)
    write_utf8()
    name = writable(args.model)
    print(json.dumps(as_json(answer, name), ensure_ascii=False) if args.json else "\n".join(lines(answer, name)))
    return FAULT if args.check and not answer.fits else DONE


def _check(args: argparse.Namespace) -> None:
    """FastKVError for flags that are of no use, before anything is looked up."""
    check_integer("batch", args.batch, 1)
    check_integer("gpus", args.gpus, 1, _MOST_GPUS)
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    if args.weights is not None:
        check_choice("weights", args.weights, ("int8",))
    if args.kv_dtype is not None:
        check_choice("kv_dtype", args.kv_dtype, KV_DTYPES)
    for flag in ("model", "revision", "device", "policy"):
        if is_broken(getattr(args, flag) or ""):
            raise FastKVError(f"--{flag}: is not UTF-8")
    if args.policy is not None and args.policy_file is not None:
        raise FastKVError("--policy-file names a policy already: leave it or --policy out")


def _policy(args: argparse.Namespace, shape: Shape) -> Policy:
    """The policy that fastkv-run would take: by flags, by a file, or what is remembered for a model that is here."""
    given = given_flags(args, SETTINGS)
    if args.policy is not None:
        return build_policy(args.policy, given)
    file = None if args.policy_file is None else read_policy_file(Path(args.policy_file))
    if shape.folder is not None and shape.has_weights:
        from fastkv.models.files import fingerprint

        files = fingerprint(shape.folder)
        file = remembered_policy(files) if file is None else file
        if file is not None:
            file.check_model(files)
    return build_policy("fastkv", given) if file is None else file.build(given)


if __name__ == "__main__":
    sys.exit(main())
