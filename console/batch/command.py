"""fastkv-batch: many prompts answered by several engines at once, into a folder from which a stopped run continues.

Nothing goes to stdout; figures and complaints go to stderr. Heavy imports wait until flags and prompts are known to be
good, and Ray is started only where there is something to do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.cache.catalogue import SETTINGS
from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.layer_map import read_map
from fastkv.cache.setting import settings_of
from fastkv.console.asked import print_figures
from fastkv.console.batch import pipeline
from fastkv.console.batch.flags import NAME, NAMED_SETTINGS, build_parser
from fastkv.console.batch.folder import OutputFolder, missing
from fastkv.console.batch.room import Room, Wanted
from fastkv.console.batch.shards import Prompts, Shard, read_prompts
from fastkv.console.batch.tally import Tally
from fastkv.console.batch.worker import Setup
from fastkv.console.chat_flags import chat_arguments
from fastkv.console.job import about_flags
from fastkv.console.parser import DONE, INTERRUPTED, flag_of, guarded, say
from fastkv.console.policy_file import PolicyFile, read_policy_file
from fastkv.console.policy_text import build_policy
from fastkv.console.progress import ProgressLine
from fastkv.console.prompt import check_texts
from fastkv.console.run_flags import SAMPLING_FLAGS, given_flags
from fastkv.console.sharing import check_share_layers
from fastkv.console.tuned import tuned_policy
from fastkv.console.words import counted
from fastkv.errors import FastKVError, brief, check_integer, writable

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a user's mistake, 130 interrupted."""
    return guarded(NAME, lambda: _run(build_parser().parse_args(argv)), NAMED_SETTINGS)


def _run(args: argparse.Namespace) -> int:
    args.chat_arg = chat_arguments(args.chat_arg)
    wanted = _wanted(args)
    _check(args)
    prompts = read_prompts(Path(args.prompts), args.shard_size)
    batch = Batch(args, prompts)
    folder = Path(os.path.abspath(args.output))
    if missing(folder, prompts.shards):
        pipeline.check_ray()
    with OutputFolder(folder, batch.content) as output:
        return _work(batch, output, wanted)


def _work(batch: Batch, output: OutputFolder, wanted: Wanted) -> int:
    """Have done what is not done yet; say what became of it."""
    args, shards = batch.args, output.missing(batch.prompts.shards)
    tally = Tally(batch.prompts, shards)
    status = DONE
    try:
        if shards:
            _answer(batch, output, wanted, shards, tally)
    except KeyboardInterrupt:
        status = INTERRUPTED
        some = len(output.missing(batch.prompts.shards)) < len(batch.prompts.shards)
        where = f"continues after the shards that are in {args.output}" if some else "begins anew: no shard was done"
        line = f"stopped; the same command {where}"
    except FastKVError as error:
        raise error if batch.tuned is None else batch.tuned.blamed(error, batch.given) from None
    else:
        tally.check(output.missing(batch.prompts.shards))
        line = tally.line(args.output, output.begun_again())
    if not args.quiet:
        print_figures(batch.source)
        say(line)
    return status


def _answer(batch: Batch, output: OutputFolder, wanted: Wanted, shards: list[Shard], tally: Tally) -> None:
    def setup_of(room: Room) -> Setup:
        return batch.setup(room, output)

    with (
        pipeline.quiet(),
        ProgressLine(sys.stderr) as line,
        contextlib.closing(pipeline.run(setup_of, shards, wanted)) as each,
    ):
        first = 0  # prompts of the shard that came with the models being loaded: no measure of the time left
        for done in each:
            for text in tally.add(done):
                say(text)
            first = first or tally.records
            told = f"{tally.records:,} of {counted(tally.todo, 'prompt')}"
            line.show(told, tally.records - first, tally.todo - first)


class Batch:
    """What is to be answered, by what: the flags, made sure of.

    content: what the output folder says of it. source: where the policy comes from, for the figures. Raises FastKVError
    for a model that is not there, a policy that is none, and settings out of range.
    """

    def __init__(self, args: argparse.Namespace, prompts: Prompts) -> None:
        from fastkv.engine.sampler import SamplingParams

        self.args, self.prompts = args, prompts
        self.given = given_flags(args, SETTINGS)
        self._params = SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **given_flags(args, SAMPLING_FLAGS))
        file = None if args.policy_file is None else read_policy_file(Path(args.policy_file))
        policy = build_policy(args.policy or "fastkv", self.given) if file is None else file.build(self.given)
        self.tuned: PolicyFile | None = tuned_policy(args.model, args.revision, file) if args.policy is None else None
        self._policy = policy if self.tuned is None else self.tuned.build(self.given)
        self.source = [] if self.tuned is None else [("tuned", self.tuned.told(self.given))]
        self._files = _fingerprint(args.model, args.revision)
        self.content = self._content()

    def setup(self, room: Room, output: OutputFolder) -> Setup:
        """What workers need to know, with names of files that hold in any folder."""
        args = argparse.Namespace(**{**vars(self.args), "device": room.device, "threads": room.threads})
        args.model = _anywhere(args.model)
        args.share_layers = None if args.share_layers is None else _anywhere(args.share_layers)
        limits = {name: getattr(args, name) for name in ("decode_budget", "reuse_prefix")}
        if args.batch_size is not None:
            limits["batch_size"] = args.batch_size
        if args.kv_memory is not None:
            limits["kv_memory"] = args.kv_memory * 2**20
        return Setup(
            args=args,
            about=about_flags(self.args),
            policy=(self._policy.name, _settings(self._policy)),
            sampling=dataclasses.asdict(self._params),
            limits=limits,
            prompts=os.path.abspath(self.args.prompts),
            folder=str(output.path),
            manifest=output.manifest,
            model_files=self._files,
        )

    def _content(self) -> dict[str, Any]:
        """Everything that answers depend on; what else there is to say is said by their records."""
        args, prompts = self.args, self.prompts
        pairs = None if args.share_layers is None else read_map(args.share_layers).pairs
        return {
            "prompts": prompts.checksum,
            "records": prompts.records,
            "shard_size": args.shard_size,
            **about_flags(args),
            "model_files": self._files,
            **{name: getattr(args, name) for name in ("dtype", "weights", "kv_dtype", "decode_budget")},
            "shared_layers": pairs,
            "policy": {"name": self._policy.name, **_settings(self._policy)},
            "sampling": {**dataclasses.asdict(self._params), "stop_token": args.stop_token},
        }


def _wanted(args: argparse.Namespace) -> Wanted:
    address = args.address or os.environ.get("RAY_ADDRESS") or None
    address = None if address == "local" else address
    wanted = Wanted(args.workers, args.gpus_per_worker, args.threads, args.device, address)
    wanted.check()
    return wanted


def _check(args: argparse.Namespace) -> None:
    """FastKVError for flags that are of no use, before anything is read."""
    for flag in ("system", "chat_arg"):
        if getattr(args, flag) not in (None, {}) and not args.chat:
            raise FastKVError(f"{flag_of(flag)} is for --chat: add --chat, or leave it out")
    check_texts(args, "revision", "address", "system", "stop", "stop_token", "chat_arg")
    for name in ("prompts", "output"):
        if getattr(args, name) in ("", "-"):
            raise FastKVError(f"{flag_of(name)} takes a name, not {brief(getattr(args, name))}")
    for name in ("shard_size", "batch_size", "kv_memory"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1)
    if args.policy is not None and args.policy_file is not None:
        raise FastKVError("--policy-file names a policy already: leave it or --policy out")
    check_share_layers(args)
    if args.decode_budget is not None:
        DecodeBudget(args.decode_budget)


def _anywhere(name: str) -> str:
    """A file's name that holds in any folder; a hub id as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _settings(policy: Policy) -> dict[str, Any]:
    return {name: getattr(policy, name) for name in settings_of(type(policy))}


def _fingerprint(model: str, revision: str | None) -> str:
    """Of the model's files, which are downloaded first where `model` is a hub id; FastKVError where there are none."""
    from fastkv.models.config import ModelConfig
    from fastkv.models.files import fingerprint
    from fastkv.models.hub import model_folder

    folder = model_folder(model, revision)
    ModelConfig.from_pretrained(folder)
    try:
        return fingerprint(folder)
    except OSError as error:
        raise FastKVError(f"{writable(str(folder))}: cannot be read ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main())
