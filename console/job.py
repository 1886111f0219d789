"""Answer many prompts into one JSONL file, from which a run that was stopped continues.

A record is written as soon as its answer is there. A later run with the same output leaves out what has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.jsonl import RecordFile, difference
from fastkv.console.progress import ProgressLine
from fastkv.console.prompt import Job
from fastkv.console.summary import as_json
from fastkv.console.words import counted
from fastkv.errors import FastKVError, writable

if TYPE_CHECKING:
    import torch

    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Output
    from fastkv.engine.sampler import SamplingParams
    from fastkv.engine.turn import Turn
    from fastkv.kernels.ranks import Ranks

_BEGINNING = b'{"id": '  # of every record
_OF_AN_ANSWER = ("text", "token_ids", "finish_reason", "warning", "metrics")


class Records:
    """The output file: one JSON object a line, with the `id` and the digest of its prompt. A context manager.

    about: what the whole run has in common (model, policy, sampling); a file that was written with other settings, or
    for other prompts under the same names, is refused with FastKVError, and so is one that holds anything else. A last
    record that was cut short is dropped.
    """

    def __init__(self, path: str, about: dict[str, Any], jobs: Sequence[Job]) -> None:
        self.done: set[str] = set()
        self._about = about
        self._file = RecordFile(Path(path))
        try:
            self._continue({job.id: job.digest for job in jobs})
        except BaseException:
            self._file.close()
            raise

    def append(self, job: Job, answer: dict[str, Any]) -> None:
        """Write the record of an answer, for good."""
        self._file.append({"id": job.id, "prompt_sha256": job.digest, **self._about, **answer})
        self.done.add(job.id)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _continue(self, digests: dict[str, str]) -> None:
        for number, record in enumerate(self._file.objects, 1):
            self._check(number, record, digests)
        tail = self._file.tail
        # A file named by mistake may be the only copy: nothing is cut off but a record or its beginning.
        if not (tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail)) or _is_another_object(tail):
            raise self._file.foreign(len(self._file.objects) + 1)
        self._file.drop_tail()

    def _check(self, number: int, record: dict[str, Any], digests: dict[str, str]) -> None:
        if not _is_record(record):
            raise self._file.foreign(number)
        found = flat(record)
        for name, value in flat(json.loads(json.dumps(self._about))).items():
            if found.get(name) != value:
                raise self._file.refused(f"was made with {name} {difference(found.get(name), value)}", number)
        if digests.get(record["id"], record["prompt_sha256"]) != record["prompt_sha256"]:
            raise self._file.refused(f"prompt {record['id']} was another text", number)
        self.done.add(record["id"])


class FollowingRecords:
    """What a rank that writes nothing has in place of Records: what rank 0 found there."""

    def __init__(self, done: Iterable[str]) -> None:
        self.done = set(done)

    def append(self, job: Job, answer: dict[str, Any]) -> None:
        self.done.add(job.id)

    def __enter__(self) -> FollowingRecords:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _records(
    ranks: Ranks | None, device: torch.device, output: str, about: dict[str, Any], jobs: Sequence[Job]
) -> Records | FollowingRecords:
    """The output file, which of several ranks the first one has: it says which answers are there already."""
    if ranks is None:
        return Records(output, about, jobs)
    if ranks.rank > 0:
        return FollowingRecords(json.loads(ranks.text("", device)))
    records = Records(output, about, jobs)
    ranks.text(json.dumps(sorted(records.done)), device)
    return records


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("id", "prompt_sha256"))


def _is_another_object(tail: bytes) -> bool:
    """Whether a line without its end is whole, and no record."""
    try:
        return not _is_record(json.loads(tail))
    except (ValueError, RecursionError):
        return False


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of settings under one name each: {"policy": {"window": 8}} as {"policy window": 8}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat.update({f"{name} {key}".strip(): entry for key, entry in inner.items()})
    return flat


def named(job: Job, why: object, setting: str | None) -> FastKVError:
    """A complaint about one of several prompts."""
    return FastKVError(f"prompt {job.id}: {why}", setting=None if setting == "prompt" else setting)


def about_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What a record says of the command: the model, and how its prompt was put."""
    names = ("revision", "chat", "system", "chat_arg", "reuse_prefix")  # answers depend on the last, but under `full`
    return {"model": writable(args.model), **{name: getattr(args, name) for name in names}}


def about_engine(llm: LLM, params: SamplingParams, decode_budget: int | None) -> dict[str, Any]:
    """What a record says of the model that ran, and of its settings."""
    return {
        "dtype": llm.model.precision,
        "policy": {"name": llm.policy.name, **llm.policy.settings(llm.config.n_layers)},
        "sampling": dataclasses.asdict(params),
        "decode_budget": decode_budget,  # other answers, unlike the other limits
        "kv_dtype": llm.kv_dtype,
        "shared_layers": [list(pair) for pair in llm.share_layers.items()] or None,
    }


def answer_fields(answer: Output) -> dict[str, Any]:
    """What a record says of its answer."""
    fields = as_json(answer)
    return {name: fields[name] for name in _OF_AN_ANSWER}


def run_jobs(
    llm: LLM,
    jobs: Sequence[Job],
    prompt_of: Callable[[Job], str | list[int] | Turn],
    params: SamplingParams,
    output: str,
    about: dict[str, Any],
    limits: dict[str, Any],
) -> str:
    """Answer what has no record in `output` yet; a line of figures.

    prompt_of: a job's prompt as the model is to see it. about: what else a record says of the whole run. limits:
    decode_budget, batch_size, kv_memory and reuse_prefix of `LLM.generate_each`.
    """
    about = {**about, **about_engine(llm, params, limits.get("decode_budget"))}
    with _records(llm.ranks, llm.device, output, about, jobs) as records, ProgressLine(sys.stderr) as line:
        todo = [job for job in jobs if job.id not in records.done]
        started, new_tokens, warned, reused = time.perf_counter(), 0, 0, 0
        try:
            each = llm.generate_each([prompt_of(job) for job in todo], params, **limits)
        except FastKVError as error:
            if error.prompt is None:
                raise
            raise named(todo[error.prompt], error.__cause__, error.setting) from None
        for count, (index, answer) in enumerate(each, 1):
            fields = answer_fields(answer)
            records.append(todo[index], fields)
            new_tokens += answer.metrics.new_tokens
            reused += answer.metrics.reused_tokens
            warned += fields["warning"] is not None
            line.show(f"{count:,} of {counted(len(todo), 'prompt')}", count, len(todo))
        seconds = time.perf_counter() - started
    known = len(jobs) - len(todo)
    before = f"; {known:,} {'was' if known == 1 else 'were'} there already" if known else ""
    speed = f", {new_tokens / seconds:,.1f} tokens/s with their prompts" if todo else ""
    shared = f"; {reused:,} tokens of prompts that begin alike were read once" if reused else ""
    warnings = f'; see "warning" in {warned:,} of them' if warned else ""
    answers, tokens = counted(len(todo), "answer"), counted(new_tokens, "token")
    return f"{answers} to {output}: {tokens} in {seconds:,.1f} s{speed}{shared}{warnings}{before}"
