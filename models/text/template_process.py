"""The process that renders a model's chat template: started for the first conversation, ended when it takes too long.

What it runs is template_program.py. It reads its requests from a pipe and ends when the pipe does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError, FaultError

_PROGRAM = Path(__file__).with_name("template_program.py")
_PATIENCE = 60.0  # seconds on the clock, where the system cannot count those of the processor, or is very busy

SECONDS = 2.0  # of the processor, for one conversation; real templates take milliseconds


class TemplateEndedError(FaultError):
    """The process has not answered: it took too long or too much, or something else has ended it."""


class TemplateProcess:
    """source: the template. path: the file that it stands in, for messages."""

    def __init__(self, source: str, path: Path) -> None:
        self._source, self._path = source, path
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Here, or in a fork, which must not use the pipes of its parent, nor wait for its threads."""
        self._owner = os.getpid()
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, variables: dict[str, Any], arguments: list[str]) -> str:
        """The text that the template writes. arguments: names among the variables that it has to use.

        Raises FastKVError where it is broken, refuses, or does not use an argument, and TemplateEndedError.
        """
        try:
            line = json.dumps({"variables": variables, "arguments": arguments}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise FastKVError(
                f"messages and arguments of a chat can hold what JSON can, and no more ({error})"
            ) from None
        if self._owner != os.getpid():
            self._begin_anew()
        with self._turn:
            reply = self._reply(line)
        return self._text(reply)

    def _text(self, answer: dict[str, str]) -> str:
        if "broken" in answer:
            raise FastKVError(f"{self._path}: the chat template is broken ({answer['broken']})")
        if "refused" in answer:
            raise FastKVError(f"{self._path}: the chat template cannot render these messages ({answer['refused']})")
        if "unused" in answer:
            raise FastKVError(f"{self._path}: the chat template uses no {answer['unused']}", setting="chat_arg")
        return answer["text"]

    def _reply(self, line: bytes) -> dict[str, str]:
        """The process's answer to a line. Where it does not come whole, whatever the reason, the process is ended."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        overtime = threading.Timer(_PATIENCE, process.kill)
        reply: Any = None
        with suppress(RuntimeError):  # no thread can be started: the process still has its own limit
            overtime.start()
        try:
            reply = json.loads(_asked(process, line))
        except (OSError, ValueError):  # it ended while it read, or while it wrote
            pass
        finally:
            overtime.cancel()
            if not isinstance(reply, dict) or not {"text", "broken", "refused", "unused"} & set(reply):
                self._ending()  # also where we are interrupted: the answer would be taken for that to the next line
                self._process = reply = None
        if reply is None:
            raise TemplateEndedError(
                f"{self._path}: the process that renders the chat template has ended; it may take {SECONDS:g} s and "
                "some hundred MiB for a conversation"
            )
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable or "", "-I", str(_PROGRAM)],  # -I: nobody's variables change what it is
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
        except OSError as error:
            python = sys.executable or "no Python"
            raise FaultError(f"{self._path}: {python} could not be started for the chat template ({error})") from None
        self._ending = weakref.finalize(self, _end, process)
        first = {"path": [place for place in sys.path if place], "template": self._source, "seconds": SECONDS}
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(json.dumps(first).encode() + b"\n")
        return process


def _asked(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    return process.stdout.readline()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()
