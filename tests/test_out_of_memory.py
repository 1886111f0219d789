"""Running out of memory is told in one line, with advice that fits, whichever library says it and however."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkv import LLM, FastKVError
from fastkv.cli import main
from fastkv.console.parser import guarded
from fastkv.engine.memory import explain_out_of_memory
from fastkv.kernels import out_of_memory
from fastkv.kernels.out_of_memory import LOADING, REQUEST

SAID = [
    MemoryError(),
    MemoryError("Cannot allocate memory (os error 12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("tokenizers.so: failed to map segment from shared object"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("unable to mmap 269060552 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
]
OTHERS = [RuntimeError("shapes cannot be multiplied"), ValueError("x"), OSError(errno.ENOENT, "no file"), KeyError(3)]


@pytest.mark.parametrize("error", SAID, ids=repr)
def test_every_way_to_say_it_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "address_space_left", lambda: None)
    words = r"^out of memory for the request.*take a shorter prompt"
    with pytest.raises(FastKVError, match=words) as caught, explain_out_of_memory(REQUEST):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_stay_what_they_are(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "address_space_left", lambda: None)
    with pytest.raises(type(error)) as caught, explain_out_of_memory(REQUEST):
        raise error
    assert caught.value is error


def test_a_complaint_that_hides_it_is_found_out() -> None:
    """Opening a file failed for want of memory: it is as whole as it was."""

    def read() -> None:
        try:
            raise MemoryError("no room to map it")
        except MemoryError:
            raise FastKVError("model.safetensors: not a whole file; download it again") from None

    words = r"out of memory for loading the model .*smaller model"
    with pytest.raises(FastKVError, match=words), explain_out_of_memory(LOADING):
        read()


def test_what_was_being_handled_before_is_another_matter() -> None:
    """Who asks again after a failure, with a mistake this time, is told the mistake."""

    @explain_out_of_memory(REQUEST)
    def ask() -> None:
        raise FastKVError("the prompt is empty")

    try:
        raise MemoryError
    except MemoryError:
        with pytest.raises(FastKVError, match=r"^the prompt is empty$"):
            ask()


def test_with_no_address_space_left_any_failure_is_one_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "address_space_left", lambda: 2**20)
    words = r"out of memory for the request \(could not create a primitive\);"
    with pytest.raises(FastKVError, match=words), explain_out_of_memory(REQUEST):
        raise RuntimeError("could not create a primitive")
    with pytest.raises(FastKVError, match=r"^a mistake$"), explain_out_of_memory(REQUEST):
        raise FastKVError("a mistake")


def test_errors_that_refer_to_each_other_come_to_an_end() -> None:
    one, other = ValueError("a"), ValueError("b")
    one.__cause__, other.__cause__ = other, one
    assert not out_of_memory.is_out_of_memory(one) or out_of_memory.address_space_left() is not None


@pytest.mark.parametrize("error", SAID, ids=repr)
def test_a_command_ends_with_one_line(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert guarded("some-command", work) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("some-command: error: out of memory for the command")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("loaded.load_weights", "out of memory for loading the model"),
        ("loaded.Tokenizer.from_pretrained", "out of memory for loading the model"),
        ("llm.Generation", "out of memory for the command"),
    ],
)
def test_what_failed_is_named(
    name: str,
    line: str,
    archive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    (tmp_path / "prompt.txt").write_text("a prompt")
    monkeypatch.setattr(f"fastkv.engine.{name}", fail)
    assert main(["--model", str(archive_folder), "--prompt", str(tmp_path / "prompt.txt"), "--device", "cpu"]) == 2
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith(f"fastkv-run: error: {line}")


def test_a_request_of_each_kind(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding, a stream and a list: whatever runs out, the line is the request's."""
    cache = tiny_llm.prefill([3, 4, 5], max_tokens=4).cache

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fastkv.engine.llm.decode_step", fail)
    monkeypatch.setattr("fastkv.engine.llm.prefill", fail)
    monkeypatch.setattr("fastkv.engine.decode_batch.prefill", fail)
    for work in (
        lambda: tiny_llm.decode(cache, torch.tensor([6])),
        lambda: tiny_llm.prefill([3, 4, 5]),
        lambda: tiny_llm.generate([3, 4, 5]),
        lambda: tiny_llm.generate([[3, 4, 5], [6]]),
    ):
        with pytest.raises(FastKVError, match=r"^out of memory for the request; take a shorter prompt"):
            work()


@pytest.mark.skipif(sys.platform != "linux", reason="a limit that this system may not hold")
@pytest.mark.parametrize("mebibytes", [60, 200])
def test_a_real_limit_too_small_for_torch(tmp_path: Path, mebibytes: int) -> None:
    """In a process of its own: not even torch can be loaded, and that is told like anything else."""
    import resource

    (tmp_path / "prompt.txt").write_text("a prompt")
    size = mebibytes * 2**20
    done = subprocess.run(
        [sys.executable, "-m", "fastkv", "--model", "any", "--prompt", str(tmp_path / "prompt.txt")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fastkv-run: error: out of memory for the command")
    assert len(done.stderr.splitlines()) == 1
