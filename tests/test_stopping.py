"""Stop strings: nothing of one is emitted, however the tokens cut the text; and the engine around them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import OUTSIDE_MODELS

from fastkv.engine.llm import LLM
from fastkv.engine.output import Output
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.stopping import StopStrings
from fastkv.errors import FastKVError

STORIES = OUTSIDE_MODELS / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not here")

BEGINNING = "Once upon a time"
STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    " She wanted to play with it, but it was too high."
)


def every_cut(text: str) -> Iterator[list[str]]:
    """Every way of cutting `text` into pieces, none of them empty."""
    for places in range(1 << (len(text) - 1)):
        ends = [place + 1 for place in range(len(text) - 1) if places >> place & 1]
        yield [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def emitted(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """What comes out for `pieces`, and whether a stop string ended it."""
    passing = StopStrings(stops)
    text = ""
    for piece in pieces:
        out, stopped = passing.push(piece)
        text += out
        if stopped:
            return text, True
    return text + passing.flush(), False


CASES = [
    # text, stop strings, what is emitted (None: all of it)
    ("hello END!", ["END"], "hello "),
    ("hello EN D", ["END"], None),
    ("END", ["END"], ""),
    ("ENDEND", ["END"], ""),
    ("xE", ["END"], None),
    ("xEN", ["E", "END"], "x"),
    ("a\n\nb", ["\n\n"], "a"),
    ("a\nb\n", ["\n\n"], None),
    ("aaab", ["aab"], "a"),
    ("aabaaab", ["aaab"], "aab"),
    ("ababac", ["abac"], "ab"),
    ("xabcabd", ["abd"], "xabc"),
    ("one two", ["two", "one"], ""),
    ("one two", ["three", "two"], "one "),
    ("héé 世界!", ["世界"], "héé "),
    ("x\U0001f600y", ["\U0001f600"], "x"),
    ("nothing", [], None),
    ("abc", ["bc", "abc"], ""),  # both end at the same character: the one that began first leaves less
    ("abc", ["abc", "bc"], ""),
    ("abcd", ["bc", "abcd"], "a"),  # "bc" is there first; "abcd" never comes to be
    ("abcd", ["abcd", "bc"], "a"),
    ("abab", ["abab", "ba"], "a"),
    ("0123456", ["12345", "34"], "012"),
]


@pytest.mark.parametrize(("text", "stops", "expected"), CASES)
def test_the_cut_into_pieces_never_matters(text: str, stops: list[str], expected: str | None) -> None:
    """Tokens fall anywhere: all 2^(n-1) ways of cutting a text give the same output.

    With several stop strings, the first to be complete ends the text, whichever token completes it. Looking for the
    leftmost match in whatever has arrived made the result depend on how long the last token was.
    """
    wanted = (text, False) if expected is None else (expected, True)
    for pieces in every_cut(text):
        assert emitted(pieces, stops) == wanted, pieces


@pytest.mark.parametrize(("text", "stops", "expected"), CASES)
def test_nothing_is_held_that_cannot_begin_a_stop(text: str, stops: list[str], expected: str | None) -> None:
    """Streaming must not lag: what is held back is at every moment a proper beginning of some stop string."""
    passing = StopStrings(stops)
    out = ""
    for count, character in enumerate(text, start=1):
        piece, stopped = passing.push(character)
        out += piece
        if stopped:
            break
        held = text[len(out) : count]
        assert text.startswith(out)
        assert held == "" or any(stop != held and stop.startswith(held) for stop in stops)


def test_empty_pieces_change_nothing() -> None:
    """A token inside a character emits no text; that must neither lose nor release what is held."""
    passing = StopStrings(["END"])
    assert [passing.push(piece) for piece in ["a", "", "E", "", "N", ""]] == [("a", False)] + [("", False)] * 5
    assert passing.push("x") == ("ENx", False)


def test_held_text_comes_out_at_the_end_and_only_once() -> None:
    passing = StopStrings(["END", "ENTER"])
    assert passing.push("the EN") == ("the ", False)
    assert passing.flush() == "EN"
    assert passing.flush() == ""


def test_text_behind_a_stop_string_is_dropped() -> None:
    passing = StopStrings(["."])
    assert passing.push("one. two") == ("one", True)
    assert passing.flush() == ""


@pytest.mark.parametrize("stop", ["", ["x", ""], [1], [None]])
def test_a_stop_that_is_no_text_is_refused(stop: object) -> None:
    """An empty stop string is found everywhere; it would end each text before it begins."""
    with pytest.raises(FastKVError, match="stop"):
        SamplingParams(stop=stop)  # type: ignore[arg-type]


def test_a_single_stop_string_is_not_taken_letter_by_letter() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@functools.cache
def stories() -> LLM:
    return LLM(STORIES, device="cpu")


@functools.cache
def generate(*stops: str, max_tokens: int = 80, **more: object) -> Output:
    """The story, by `generate`; `stream` must tell the same, piece by piece."""
    params = SamplingParams(max_tokens=max_tokens, stop=stops, **more)  # type: ignore[arg-type]
    output = stories().generate(BEGINNING, params)
    stream = stories().stream(BEGINNING, params)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == output.text
    assert [piece.token_id for piece in pieces] == output.token_ids
    assert stream.output().finish_reason == output.finish_reason
    return output


@needs_stories
def test_the_story_without_stops() -> None:
    output = generate()
    assert output.text.startswith(STORY)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 80


@needs_stories
@pytest.mark.parametrize("stop", [" little girl", "ly. Sh", "red", "Lily.", ".", "e", ", there", ","])
def test_a_stop_string_across_tokens(stop: str) -> None:
    """The text ends exactly before the stop string; the tokens that made it stay in token_ids."""
    output = generate(stop)
    assert output.text == STORY[: STORY.index(stop)]
    assert output.finish_reason == "stop"
    free = generate()
    count = len(output.token_ids)
    assert output.token_ids == free.token_ids[:count]
    # One token fewer did not hold the whole stop string.
    assert stop not in generate(max_tokens=count - 1).text if count > 1 else stop == ","
    assert stop in generate(max_tokens=count).text


@needs_stories
def test_the_first_of_several_stops_ends_the_text() -> None:
    assert generate("ball", "park", "never").text == STORY[: STORY.index("park")]


@needs_stories
def test_a_stop_that_is_begun_but_not_finished_is_emitted() -> None:
    """The text ends while "girl n" may still become "girl next": at the end it was text after all."""
    free = generate(max_tokens=9)
    output = generate(free.text[-3:] + " no such thing", max_tokens=9)
    assert output.text == free.text
    assert output.finish_reason == "length"


@needs_stories
def test_a_stop_in_the_prompt_does_not_count() -> None:
    assert generate("Once", "upon a time", "time,").text.startswith(STORY)


@needs_stories
def test_a_stop_at_the_very_last_token_is_a_stop() -> None:
    free = generate(max_tokens=12)
    stop = free.text[-8:]
    assert free.text.index(stop) == len(free.text) - 8
    output = generate(stop, max_tokens=12)
    assert output.text == free.text[:-8]
    assert len(output.token_ids) == 12
    assert output.finish_reason == "stop"


@needs_stories
def test_an_eos_releases_what_was_held(tmp_path: Path) -> None:
    """The EOS says that no more text comes: a stop string half there was text, and the reason is the EOS."""
    free = generate(max_tokens=20)
    eos = free.token_ids[-1]
    count = free.token_ids.index(eos)
    for source in STORIES.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    generation = json.loads((STORIES / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, eos]}))
    before = generate(max_tokens=count).text
    output = LLM(tmp_path, device="cpu").generate(BEGINNING, SamplingParams(max_tokens=60, stop=[before[-2:] + "\0"]))
    assert output.text == before
    assert output.token_ids == free.token_ids[: count + 1]
    assert output.finish_reason == "stop"


@needs_stories
def test_a_held_text_is_not_shown_early() -> None:
    """While a stop string may be under way, a stream shows nothing of it."""
    stop = " little girl"
    shown = ""
    for piece in stories().stream(BEGINNING, SamplingParams(max_tokens=40, stop=[stop])):
        shown += piece.text
        assert " li" not in shown
    assert shown == STORY[: STORY.index(stop)]
