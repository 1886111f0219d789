"""A worker of fastkv-batch: one engine, which answers shards and writes their files. Knows nothing of Ray.

It gives back counts, as JSON. It raises nothing: what is wrong is given back, for one line where the command runs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.asked import Asked
from fastkv.console.batch.answering import answer_lines
from fastkv.console.batch.flags import NAME, NAMED_SETTINGS
from fastkv.console.batch.folder import begin, check_shared, read_records, write_shard
from fastkv.console.batch.shards import Shard, read_shard
from fastkv.console.chat_flags import stop_token_ids
from fastkv.console.job import about_engine
from fastkv.console.load import load_by_flags
from fastkv.console.policy_text import build_policy
from fastkv.console.warnings_told import warnings_told
from fastkv.errors import FastKVError, FaultError, brief

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.engine.sampler import SamplingParams

ATTEMPTS = 4  # at a shard, before it is given up: as many workers died over it


@dataclass(frozen=True)
class Setup:
    """All that a worker needs to know, of plain values; files by names that hold on every machine.

    args: the flags, with `model` as this machine is to find it. about: what each record says of the command. policy:
    name and settings. sampling: fields of SamplingParams. limits: of `LLM.generate_each`. manifest: of the output
    folder. model_files: the fingerprint of the model's folder.
    """

    args: argparse.Namespace
    about: dict[str, Any]
    policy: tuple[str, dict[str, Any]]
    sampling: dict[str, Any]
    limits: dict[str, Any]
    prompts: str
    folder: str
    manifest: dict[str, Any]
    model_files: str


@dataclass
class Done:
    """What a worker tells of a shard.

    lost: why it could not be done. fatal: what is wrong with every shard, and `setting` and `fault` as FastKVError and
    FaultError have them. Both are None where it is done. warnings: lines for people.
    """

    shard: int
    answers: int = 0
    errors: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    warned: int = 0
    dtype: str | None = None
    lost: str | None = None
    fatal: str | None = None
    setting: str | None = None
    fault: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def records(self) -> int:
        return self.answers + self.errors


class Worker:
    """Called with a batch of shards, as Ray Data does: {"shard": [JSON, …]} -> {"done": [JSON, …]}.

    The model is loaded for the first shard, not before: a worker that dies of that has then begun a shard, which is not
    begun for ever.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._engine: tuple[LLM, SamplingParams] | None = None

    def __call__(self, batch: Mapping[str, Iterable[Any]]) -> dict[str, list[str]]:
        shards = [Shard(**json.loads(str(text))) for text in batch["shard"]]
        return {"done": [json.dumps(asdict(self.done(shard))) for shard in shards]}

    def done(self, shard: Shard) -> Done:
        """Answer a shard and write its file, unless it is there."""
        told: list[str] = []
        try:
            with warnings_told(NAME, told.append):
                done = self._done(shard)
        except FastKVError as error:
            fault = isinstance(error, FaultError)
            done = Done(shard.number, fatal=str(error), setting=error.setting, fault=fault)
        except Exception as error:  # of the program, not of a prompt; another worker may do better
            done = Done(shard.number, lost=f"{type(error).__name__}: {brief(str(error))}")
        done.warnings = list(dict.fromkeys(told))
        return done

    def _done(self, shard: Shard) -> Done:
        setup, folder = self._setup, Path(self._setup.folder)
        check_shared(folder, setup.manifest, socket.gethostname())
        if (folder / shard.name).is_file():  # by a worker that died before it could tell
            return _counted(shard, read_records(folder, shard))
        if begin(folder, shard, f"{socket.gethostname()} {os.getpid()}") > ATTEMPTS:
            return Done(shard.number, lost=f"{ATTEMPTS} workers died while they were at it")
        llm, params = self._loaded()
        asked = Asked(setup.args, llm, None, [])
        about = {**setup.about, **asked.about(), **about_engine(llm, params, setup.limits["decode_budget"])}
        lines = read_shard(Path(setup.prompts), shard)
        records = answer_lines(llm, lines, asked.prompt, params, about, setup.limits, NAMED_SETTINGS)
        write_shard(folder, shard, records)
        return _counted(shard, records)

    def _loaded(self) -> tuple[LLM, SamplingParams]:
        if self._engine is None:
            from fastkv.engine.sampler import SamplingParams
            from fastkv.models.files import fingerprint
            from fastkv.models.hub import model_folder

            setup = self._setup
            files = fingerprint(model_folder(setup.args.model, setup.args.revision))
            if files != setup.model_files:
                raise FastKVError(f"{setup.args.model}: is another model on {socket.gethostname()}")
            llm = load_by_flags(setup.args, build_policy(*setup.policy))
            ids = stop_token_ids(llm, setup.args.stop_token)
            self._engine = llm, SamplingParams(**{**setup.sampling, "stop_token_ids": ids})
        return self._engine


def _counted(shard: Shard, records: list[dict[str, Any]]) -> Done:
    answers = [record for record in records if "error" not in record]
    return Done(
        shard.number,
        answers=len(answers),
        errors=len(records) - len(answers),
        new_tokens=sum(record["metrics"]["new_tokens"] for record in answers),
        reused_tokens=sum(record["metrics"]["reused_tokens"] for record in answers),
        warned=sum(record["warning"] is not None for record in answers),
        dtype=answers[0]["dtype"] if answers else None,
    )
