"""Many prompts from files, their answers into one JSONL file, and how a run that was stopped goes on.

A record is written as soon as its answer is there. A later run with the same output leaves out what has one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.engine.progress import ProgressLine, answering
from fastkv.errors import FastKVError

if TYPE_CHECKING:  # prompts are read, and refused, before torch is there
    from fastkv.engine.llm import LLM
    from fastkv.engine.sampler import SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt and the name that its record has."""

    id: str
    prompt: str

    @property
    def digest(self) -> str:
        """Tells whether a record of that name is of this very prompt."""
        return hashlib.sha256(self.prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_jobs(path: str) -> list[Job]:
    """The prompts of a JSONL file: objects with `prompt`, a text, and, if wanted, `id` (else the number of the line).

    Raises FastKVError, naming the line, for whatever is not that.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})", setting="prompts") from None
    except UnicodeDecodeError:
        raise FastKVError(f"{path}: is not UTF-8", setting="prompts") from None
    jobs = [_job(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise FastKVError(f"{path}: holds no prompt", setting="prompts")
    check_names(jobs, "prompts")
    return jobs


def _job(path: str, number: int, line: str) -> Job:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FastKVError(f"{path}, line {number}: is not JSON ({error})", setting="prompts") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise FastKVError(f"{path}, line {number}: needs an object with a text as prompt", setting="prompts")
    unknown = sorted(set(entry) - {"prompt", "id"})
    if unknown:
        raise FastKVError(f"{path}, line {number}: {unknown[0]} is neither prompt nor id", setting="prompts")
    name = entry.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise FastKVError(
            f"{path}, line {number}: id must be a text or a whole number, not {json.dumps(name)}", setting="prompts"
        )
    if any("\ud800" <= character <= "\udfff" for character in f"{name}{entry['prompt']}"):
        raise FastKVError(f"{path}, line {number}: holds half of a surrogate pair, which is no text", setting="prompts")
    return Job(str(name), entry["prompt"])


def check_names(jobs: Sequence[Job], setting: str) -> None:
    """FastKVError for two prompts of one name: their records could not be told apart."""
    names: set[str] = set()
    for job in jobs:
        if job.id in names:
            raise FastKVError(f"there are two prompts of the name {job.id}; give each its own", setting=setting)
        names.add(job.id)


_BEGINNING = b'{"id": '  # of every record
_LONGEST = 200  # characters of two values that a complaint spells out; a table of heads has more


class Records:
    """The output file: one JSON object a line, with the `id` and the digest of its prompt.

    about: what the whole run has in common (model, policy, sampling); a file that was written with other settings, or
    for other prompts under the same names, is refused with FastKVError, and so is one that holds anything else. A last
    record that was cut short is dropped.
    """

    def __init__(self, path: str, about: dict[str, Any], jobs: Sequence[Job]) -> None:
        self._path = Path(path)
        self._about = about
        self.done: set[str] = set()
        try:
            self._continue({job.id: job.digest for job in jobs})
            with self._path.open("a"):
                pass
        except OSError as error:
            raise FastKVError(f"{path}: cannot be written ({error.strerror})", setting="output") from None

    def append(self, job: Job, answer: dict[str, Any]) -> None:
        """Write the record of an answer, for good."""
        record = {"id": job.id, "prompt_sha256": job.digest, **self._about, **answer}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.done.add(job.id)

    def _continue(self, digests: dict[str, str]) -> None:
        if not self._path.is_file():
            if self._path.exists() and not self._path.is_dir():  # a pipe or a device: reading it might never end
                raise FastKVError(f"{self._path}: is no ordinary file; take another", setting="output")
            return
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        for number, line in enumerate(lines, 1):
            self._check(number, self._parsed(number, line), digests)
        if len(whole) < len(text):
            self._check_cut(len(lines) + 1, text[len(whole) :])
            with self._path.open("r+b") as file:
                file.truncate(len(whole))

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if isinstance(record["id"], str) and isinstance(record["prompt_sha256"], str):
                return record
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise FastKVError(
            f"{self._path}, line {number}: is no record of such a run; take another file", setting="output"
        )

    def _check_cut(self, number: int, line: bytes) -> None:
        """FastKVError unless a last line without an end is a record or its beginning: nothing else is thrown away."""
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            if line.startswith(_BEGINNING) or _BEGINNING.startswith(line):
                return
        self._parsed(number, line)

    def _check(self, number: int, record: dict[str, Any], digests: dict[str, str]) -> None:
        where = f"{self._path}, line {number}:"
        for name, value in _flat(json.loads(json.dumps(self._about))).items():
            found = _flat(record).get(name)
            if found != value:
                what = f"{name} {json.dumps(found)}, not {json.dumps(value)}"
                if len(what) > _LONGEST:
                    what = f"another {name}"
                raise FastKVError(f"{where} was made with {what}; take another file", setting="output")
        if digests.get(record["id"], record["prompt_sha256"]) != record["prompt_sha256"]:
            raise FastKVError(f"{where} prompt {record['id']} was another text; take another file", setting="output")
        self.done.add(record["id"])


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of settings under one name each: {"policy": {"window": 8}} as {"policy window": 8}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat.update({f"{name} {key}".strip(): entry for key, entry in inner.items()})
    return flat


def run_jobs(
    llm: LLM,
    jobs: Sequence[Job],
    prompt_of: Callable[[Job], str | list[int]],
    params: SamplingParams,
    output: str,
    about: dict[str, Any],
    limits: dict[str, Any],
) -> str:
    """Answer what has no record in `output` yet; a line of figures.

    prompt_of: a job's prompt as the model is to see it. about: what else a record says of the whole run. limits:
    batch_size and kv_memory of `LLM.generate_each`.
    """
    from fastkv.engine.summary import as_json

    policy = {"name": llm.policy.name, **llm.policy.settings(llm.config.n_layers)}
    dtype = str(llm.dtype).removeprefix("torch.")
    about = {**about, "dtype": dtype, "policy": policy, "sampling": dataclasses.asdict(params)}
    records = Records(output, about, jobs)
    todo = [job for job in jobs if job.id not in records.done]
    started, new_tokens = time.perf_counter(), 0
    try:
        each = llm.generate_each([prompt_of(job) for job in todo], params, **limits)
    except FastKVError as error:
        if error.prompt is None:
            raise
        setting = None if error.setting == "prompt" else error.setting
        raise FastKVError(f"prompt {todo[error.prompt].id}: {error.__cause__}", setting=setting) from None
    with ProgressLine(sys.stderr, answering) as line:
        for count, (index, answer) in enumerate(each, 1):
            said = as_json(answer)
            records.append(
                todo[index], {name: said[name] for name in ("text", "token_ids", "finish_reason", "metrics")}
            )
            new_tokens += answer.metrics.new_tokens
            line.show(count, len(todo))
    seconds = time.perf_counter() - started
    before = f"; {len(jobs) - len(todo):,} were there already" if len(todo) < len(jobs) else ""
    speed = f", {new_tokens / seconds:,.1f} tokens/s with their prompts" if todo else ""
    answers = f"{len(todo):,} answer{'s' if len(todo) != 1 else ''}"
    return f"{answers} to {output}: {new_tokens:,} tokens in {seconds:,.1f} s{speed}{before}"
