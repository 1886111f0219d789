"""The text of an answer: it is what the tokenizer makes of its tokens, less what ended it, however it comes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal  # noqa: F401 (a program that shows a fault again needs it)
from fractions import Fraction  # noqa: F401
from functools import cache
from pathlib import Path
from typing import Any

from fuzz.base_folders import as_json, base_folder, write
from fuzz.edits import *  # noqa: F403
from fuzz.edits import Text
from fuzz.outcomes import require
from fuzz.rounding import require_same

from fastkv import LLM, Output, SamplingParams

BROKEN = "\ufffd"
ENDS = [1, 2, *range(40, 60)]  # many ids end an answer, so that short ones do


@dataclass(frozen=True)
class Answer:
    """kind: of base_folders.KINDS. settings: of SamplingParams. stops: texts, or (place, length) in the answer."""

    kind: str
    prompt: str
    settings: tuple[tuple[str, Any], ...] = ()
    stops: tuple[str | tuple[int, int], ...] = ()

    def smaller(self) -> Iterator[Answer]:
        for left_out in range(len(self.settings)):
            yield replace(self, settings=self.settings[:left_out] + self.settings[left_out + 1 :])
        for left_out in range(len(self.stops)):
            yield replace(self, stops=self.stops[:left_out] + self.stops[left_out + 1 :])
        if len(self.prompt) > 1:
            yield replace(self, prompt=self.prompt[: len(self.prompt) // 2])
            yield replace(self, prompt=self.prompt[len(self.prompt) // 2 :])


@dataclass(frozen=True)
class Call:
    """What is handed to the library, which may be anything."""

    prompt: Any
    settings: tuple[tuple[str, Any], ...] = ()

    def smaller(self) -> Iterator[Call]:
        for left_out in range(len(self.settings)):
            yield replace(self, settings=self.settings[:left_out] + self.settings[left_out + 1 :])
        yield replace(self, prompt="hello")


@cache
def _llm(kind: str) -> LLM:
    files = dict(base_folder("LlamaForCausalLM", kind))
    files["config.json"] = as_json({**json.loads(files["config.json"]), "eos_token_id": ENDS})
    del files["generation_config.json"]
    with tempfile.TemporaryDirectory() as folder:
        return LLM(write(files, Path(folder)), device="cpu")


def run_answer(case: Answer) -> None:
    llm = _llm(case.kind)
    params = SamplingParams(**{"max_tokens": 12, "temperature": 1.5, "seed": 1, **dict(case.settings)})
    plain = llm.generate(case.prompt, params)
    _check_plain(llm, case.prompt, params, plain)
    stops = [stop for stop in (_stop(plain.text, drawn) for drawn in case.stops) if stop]
    stopping = replace(params, stop=stops)
    answer = llm.generate(case.prompt, stopping)
    _check_stopped(plain, answer, stops)
    _check_ways(llm, case.prompt, stopping)


def _stop(text: str, drawn: str | tuple[int, int]) -> str:
    if isinstance(drawn, str):
        return drawn
    place, length = drawn
    return text[place % len(text) :][:length] if text else ""


def _check_plain(llm: LLM, prompt: str, params: SamplingParams, output: Output) -> None:
    tokenizer, ids = llm.tokenizer, list(output.token_ids)
    assert tokenizer is not None
    require(len(ids) == params.max_tokens or output.finish_reason == "stop", "an answer is as long as asked", output)
    if output.finish_reason == "stop":
        require(not params.ignore_eos and ids[-1] in ENDS, "an answer ends at an end-of-text token", output)
        ids = ids[:-1]
    require(params.ignore_eos or not set(ids) & set(ENDS), "nothing comes after an end-of-text token", output)
    before = tokenizer.encode(prompt)
    whole = tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]
    # A character that is unfinished at the end is left out: up to three bytes.
    left_out = whole.removeprefix(output.text)
    same = whole.startswith(output.text) and left_out in ("", BROKEN, BROKEN * 2, BROKEN * 3)
    require(same, "the text is what the tokens decode to", (output, whole))


def _check_stopped(plain: Output, answer: Output, stops: list[str]) -> None:
    """The first stop string to be complete, of those the one that began first, ends the text before itself."""
    count = len(answer.token_ids)
    require(answer.token_ids == plain.token_ids[:count], "stop strings change no token", (plain, answer))
    found = [(plain.text.find(stop) + len(stop), plain.text.find(stop)) for stop in stops if stop in plain.text]
    if not found:
        require(answer.text == plain.text, "stop strings that never come change nothing", (plain, answer, stops))
        return
    require(answer.finish_reason == "stop", "a stop string ends the answer", (plain, answer, stops))
    require(answer.text == plain.text[: min(found)[1]], "the text ends before the stop string", (plain, answer, stops))


def _check_ways(llm: LLM, prompt: str, params: SamplingParams) -> None:
    expected = llm.generate(prompt, params)
    stream = llm.stream(prompt, params)
    pieces = list(stream)
    require(
        "".join(piece.text for piece in pieces) == expected.text, "the pieces add up to the text", (pieces, expected)
    )
    require([piece.token_id for piece in pieces] == expected.token_ids, "a stream has the same tokens", expected)
    require(stream.output().text == expected.text, "a stream knows its text", expected)
    together = lambda: llm.generate([prompt, "hello", prompt], [params, SamplingParams(max_tokens=3), params])  # noqa: E731
    require_same(
        llm,
        lambda: _told(together()[::2]),
        lambda: _told([llm.generate(prompt, params)] * 2),
        "a list changes no answer",
    )


def _told(outputs: list[Output]) -> list[tuple[str, list[int], str]]:
    return [(output.text, output.token_ids, output.finish_reason) for output in outputs]


def run_call(case: Call) -> None:
    """Whatever is handed over: an answer, or FastKVError."""
    llm = _llm("json")
    prompt = case.prompt.whole() if isinstance(case.prompt, Text) else case.prompt
    settings = {name: value.whole() if isinstance(value, Text) else value for name, value in case.settings}
    output = llm.generate(prompt, SamplingParams(**{"max_tokens": 2, **settings}))
    for one in output if isinstance(output, list) else [output]:
        require(all(0 <= token < llm.config.vocab_size for token in one.token_ids), "tokens of the vocabulary", one)
        one.text.encode("utf-8")
