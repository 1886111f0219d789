"""A tokenizer.json that is broken, hostile or new ends in one line, and says nothing else on stderr."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastkv.errors import FastKVError
from fastkv.models.text import native
from fastkv.models.text.growth import MOST, growth
from fastkv.models.text.native import LibraryError, guarded_call
from fastkv.models.text.tokenizer_json import JsonVocabulary

Change = dict[str, Any]


def replaced(content: str, **pattern: str) -> Change:
    return {"type": "Replace", "pattern": pattern, "content": content}


def several(*steps: Change, name: str = "normalizers") -> Change:
    return {"type": "Sequence", name: list(steps)}


def charsmap(*texts: bytes) -> Change:
    table = (8).to_bytes(4, "little") + b"\1" * 8 + b"\0".join(texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def change(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


PRE = "pretokenizers"
LONG, DOUBLE = "x" * 10**6, replaced("aa", String="a")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BOMBS: dict[str, Change] = {
    "a novel for a letter": {"normalizer": replaced(LONG, String="a")},
    "a novel for nothing": {"normalizer": replaced(LONG, Regex="")},
    "a novel in front": {"normalizer": {"type": "Prepend", "prepend": LONG}},
    "twice, and again": {"normalizer": several(*[DOUBLE] * 30)},
    "sequences inside": {"normalizer": several(several(*[DOUBLE] * 6), several(*[DOUBLE] * 6))},
    "bytes of bytes": {"normalizer": several(*[{"type": "ByteLevel"}] * 30)},
    "before the words": {"pre_tokenizer": several(*[BYTES] * 30, name=PRE)},
    "both together": {"normalizer": several(*[DOUBLE] * 5), "pre_tokenizer": several(*[BYTES] * 9, name=PRE)},
    "a table": {"normalizer": charsmap(b"short", LONG.encode())},
    "on the way back": {"decoder": replaced(LONG, String="a")},
    "on the way back, again": {"decoder": several(*[DOUBLE] * 30, name="decoders")},
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_tokenizer_that_blows_texts_up_is_refused(path: Path, bomb: str) -> None:
    """It used to hang at the first prompt, or while loading where it has a normalised token."""
    with pytest.raises(FastKVError, match=r"tokenizer\.json.*longer"):
        JsonVocabulary(change(path, **BOMBS[bomb]))


def test_a_bomb_does_not_go_off_while_loading(path: Path) -> None:
    """The library runs the normalizer on a normalised token as soon as it reads it."""
    token = {"id": 256, "content": "a" * 10**5, "special": False, **dict.fromkeys(("lstrip", "rstrip"), False)}
    tokens = [{**token, "single_word": False, "normalized": True}]
    with pytest.raises(FastKVError, match=r"tokenizer\.json.*longer"):
        JsonVocabulary(change(path, normalizer=replaced(LONG, String="a"), added_tokens=tokens))
    path.write_text(path.read_text().replace('"normalized"', '"normalize\\u0064"'))
    with pytest.raises(FastKVError, match=r"tokenizer\.json.*longer"):
        JsonVocabulary(path)


@pytest.mark.parametrize("key", ["vocab", "v\\u006fcab"])
def test_a_piece_that_would_crash_the_library_is_refused(path: Path, key: str) -> None:
    """The library takes a list of pieces apart by recursion: a long one ended the process."""
    change(path, model={"type": "Unigram", "unk_id": 0, "vocab": [["é" * 300_000, 0.0]]})
    path.write_text(path.read_text().replace('"vocab"', f'"{key}"'))
    with pytest.raises(FastKVError, match=r"tokenizer\.json.*300,000 characters"):
        JsonVocabulary(path)


@pytest.mark.parametrize("one_inside", [True, False])
def test_a_frame_of_a_million_tokens_is_refused(path: Path, one_inside: bool) -> None:
    tokens = {"<s>": {"id": "<s>", "ids": [0] * 2000, "tokens": ["a"] * 2000}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    step = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    step = {"type": "Sequence", "processors": [step]} if one_inside else step
    with pytest.raises(FastKVError, match=r"tokenizer\.json.*post-processor"):
        JsonVocabulary(change(path, post_processor=step))


@pytest.mark.parametrize(
    "step",
    [
        several({"type": "Prepend", "prepend": "▁"}, replaced("▁", String=" ")),
        several(replaced(" ", Regex=" {2,}"), replaced('"', String="``"), {"type": "NFKD"}, {"type": "Lowercase"}),
        several(charsmap("ﷺ".encode(), "صلى الله عليه وسلم".encode()), replaced(" ", Regex=" {2,}"), {"type": "NFKD"}),
        replaced("", Regex="a novel that is taken out"),
    ],
)
def test_published_steps_stay_far_below_the_bound(step: Change) -> None:
    assert growth({"normalizer": step, "pre_tokenizer": {"type": "Metaspace"}}) < MOST


def test_steps_inside_steps_without_end(path: Path) -> None:
    nested = '{"type":"Sequence","normalizers":[' * 900 + "]}" * 900
    text = path.read_text()
    assert '"normalizer":null' in text.replace(" ", "")
    path.write_text(json.dumps(json.loads(text) | {"normalizer": "@"}).replace('"@"', nested))
    with pytest.raises(FastKVError, match=r"tokenizer\.json"):
        JsonVocabulary(path)


UNLISTED = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}], "pair": []}
PANICS: dict[str, Change] = {
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "an expression that never ends": {"normalizer": replaced("b", Regex="(a+)+$")},
    "an unlisted token": {"post_processor": {**UNLISTED, "special_tokens": {}}},
}


@pytest.mark.parametrize("panic", PANICS)
def test_a_panic_is_an_error_and_prints_nothing(path: Path, capfd: pytest.CaptureFixture[str], panic: str) -> None:
    """It is no Exception to Python, and has printed its text on stderr by the time that it is caught."""
    change(path, **PANICS[panic])

    def use() -> None:
        vocabulary = JsonVocabulary(path)
        vocabulary.frame(None)
        vocabulary.encode("a" * 36 + "!")

    with pytest.raises((FastKVError, LibraryError)):
        use()
    assert capfd.readouterr() == ("", "")


def test_what_others_write_to_stderr_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    with guarded_call():
        os.write(2, b"one\n")
    panic = b"\nthread '<unnamed>' (7) panicked at src/lib.rs:1:1:\nsaid\nnote: run with `RUST_BACKTRACE=1` to see\n"

    def fail() -> None:
        os.write(2, b"two\n" + panic + b"three\n")
        raise ValueError("said")

    with pytest.raises(LibraryError, match="said"), guarded_call():
        fail()
    print("four", file=sys.stderr)
    assert capfd.readouterr().err == "one\ntwo\nthree\nfour\n"


def test_calls_of_several_threads_do_not_wait_for_one_another(capfd: pytest.CaptureFixture[str]) -> None:
    """A long prompt that one thread encodes must not stop the answers of the others."""
    inside = threading.Barrier(2, timeout=20)

    def call() -> None:
        with guarded_call():
            inside.wait()
            os.write(2, b"said\n")

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == "said\nsaid\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_during_a_call_has_its_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with guarded_call():
        child = os.fork()
        if not child:
            os.write(2, b"the child's\n")
            os._exit(0)
        os.waitpid(child, 0)
        os.write(2, b"the parent's\n")
        assert "child" in capfd.readouterr().err
    assert capfd.readouterr().err == "the parent's\n"


@pytest.mark.parametrize("fails", ["_file", "os.dup"])
def test_a_system_that_has_no_file_to_hold_stderr_back(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """No folder for temporary files, or no file descriptor left: the call goes on, and so does the next one."""

    def full(*_: Any) -> int:
        raise OSError("no file")

    with monkeypatch.context() as patch:
        patch.setattr(native._stderr, "_held", None)
        patch.setattr(f"fastkv.models.text.native.{fails}", full)
        for _ in range(2):
            with pytest.raises(LibraryError), guarded_call():
                raise BaseException("a panic")
    assert native._stderr._calls == 0


@pytest.mark.parametrize(
    ("part", "step", "expected"),
    [
        ("pre_tokenizer", {"type": "FixedLength", "length": 7}, True),
        ("pre_tokenizer", several({"type": "FixedLength", "length": 7}, BYTES, name=PRE), True),
        ("normalizer", replaced("b", Regex="(a+)+$"), True),
        ("normalizer", replaced("b", String=""), True),
        ("normalizer", {"type": "Nmt"}, True),  # a kind that is not known to be tame
        ("normalizer", replaced("b", String="a"), False),
        ("normalizer", replaced("b", Regex=" {2,}"), False),
        ("pre_tokenizer", BYTES, False),
    ],
)
def test_stderr_is_held_back_for_steps_that_may_panic_alone(
    path: Path, part: str, step: Change, expected: bool
) -> None:
    """A program that another thread starts meanwhile would have the wrong stderr."""
    assert JsonVocabulary(change(path, **{part: step}))._quiet == expected


def test_a_closed_stderr_is_no_matter(path: Path) -> None:
    vocabulary = JsonVocabulary(path)
    kept = os.dup(2)
    os.close(2)
    try:
        assert vocabulary.decode(vocabulary.encode("hello")) == "hello"
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.mark.parametrize("leaves", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_no_fault_of_the_library_passes(leaves: type[BaseException]) -> None:
    with pytest.raises(leaves), guarded_call():
        raise leaves


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pre_tokenizer": {"type": "OfNextYear"}}, "upgrade tokenizers"),
        ({"model": {"type": "OfNextYear"}}, "upgrade tokenizers"),
        ({"model": None}, "download it again"),
    ],
)
def test_a_tokenizer_of_a_newer_release_is_told_from_a_broken_one(path: Path, values: Change, says: str) -> None:
    with pytest.raises(FastKVError, match=r"tokenizer\.json") as caught:
        JsonVocabulary(change(path, **values))
    assert says in str(caught.value)
