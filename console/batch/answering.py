"""Answer the records of a shard. One that fails is a record that says why, and the others are answered all the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from fastkv.console.batch.shards import Line
from fastkv.console.job import answer_fields
from fastkv.console.parser import flag_of
from fastkv.console.prompt import Job
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Output
    from fastkv.engine.sampler import SamplingParams
    from fastkv.engine.turn import Turn

    Prompt = str | list[int] | Turn


def answer_lines(
    llm: LLM,
    lines: Sequence[Line],
    prompt_of: Callable[[Job], Prompt],
    params: SamplingParams,
    about: dict[str, Any],
    limits: dict[str, Any],
    flags: Collection[str],
) -> list[dict[str, Any]]:
    """A record of each line, in their order: what fastkv-run writes, and the number of the line; or `error`.

    prompt_of: a job's prompt as the model is to see it. about: what a record says of the whole run. limits: those of
    `LLM.generate_each`. flags: settings that a complaint names the flag of. Raises FastKVError for what is wrong with
    all of them.
    """
    found: dict[int, dict[str, Any]] = {}
    prompts: dict[int, Prompt] = {}
    for place, line in enumerate(lines):
        try:
            if line.job is None:
                raise FastKVError(line.wrong or "is no prompt")
            prompts[place] = prompt_of(line.job)
        except FastKVError as error:
            found[place] = _failed(line, error, flags)
    for place, answer in zip(prompts, answered(llm, list(prompts.values()), params, limits), strict=True):
        line = lines[place]
        if isinstance(answer, FastKVError):
            found[place] = _failed(line, answer, flags)
        else:
            found[place] = {**_beginning(line), **about, **answer_fields(answer)}
    return [found[place] for place in range(len(lines))]


def answered(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, limits: dict[str, Any]
) -> list[Output | FastKVError]:
    """The answer to each prompt, or what is wrong with it. Raises FastKVError for what is wrong with all of them.

    What is wrong with a prompt itself is found before anything runs. What fails at work stops all that are at work, and
    each that has no answer yet is then asked alone.
    """
    found: dict[int, Output | FastKVError] = {}
    alone = False
    while todo := [place for place in range(len(prompts)) if place not in found]:
        todo = todo[:1] if alone else todo
        try:
            each = llm.generate_each([prompts[place] for place in todo], params, **limits)
        except FastKVError as error:
            if error.prompt is None:
                raise
            cause = error.__cause__
            found[todo[error.prompt]] = cause if isinstance(cause, FastKVError) else error
            continue
        try:
            for index, output in each:
                found[todo[index]] = output
        except FastKVError as error:
            if len(todo) == 1:
                found[todo[0]] = error
            alone = True
    return [found[place] for place in range(len(prompts))]


def _failed(line: Line, error: FastKVError, flags: Collection[str]) -> dict[str, Any]:
    named = error.setting in flags and error.setting not in (None, "prompt", "prompts")
    flag = f"{flag_of(error.setting)}: " if named and error.setting is not None else ""
    return {**_beginning(line), "error": f"{flag}{error}"}


def _beginning(line: Line) -> dict[str, Any]:
    return {"id": line.id, "line": line.number, "prompt_sha256": None if line.job is None else line.job.digest}
