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

from fastkv.errors import FastKVError

_PROGRAM = Path(__file__).with_name("template_program.py")
_PATIENCE = 60.0  # seconds on the clock, where the system cannot count those of the processor, or is very busy

SECONDS = 2.0  # of the processor, for one conversation; real templates take milliseconds


class TemplateProcess:
    """source: the template. path: the file that it stands in, for messages."""

    def __init__(self, source: str, path: Path) -> None:
        self._source, self._path = source, path
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork would share its pipes
        self._turn = threading.Lock()

    def render(self, variables: dict[str, Any], arguments: list[str]) -> str:
        """The text that the template writes. arguments: names among the variables that it has to use.

        Raises FastKVError where it is broken, refuses, takes too long or too much, or does not use an argument.
        """
        try:
            line = json.dumps({"variables": variables, "arguments": arguments}).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise FastKVError(f"the messages of a chat are texts in dicts, and what else JSON has ({error})") from None
        with self._turn:
            reply = self._reply(line)
        if not reply:
            raise FastKVError(
                f"{self._path}: the chat template takes more than {SECONDS:g} s or too much memory for these messages"
            )
        return self._text(json.loads(reply))

    def _text(self, answer: dict[str, str]) -> str:
        if "broken" in answer:
            raise FastKVError(f"{self._path}: the chat template is broken ({answer['broken']})")
        if "refused" in answer:
            raise FastKVError(f"{self._path}: the chat template cannot render these messages ({answer['refused']})")
        if "unused" in answer:
            raise FastKVError(f"{self._path}: the chat template uses no {answer['unused']}", setting="chat_arg")
        return answer["text"]

    def _reply(self, line: bytes) -> bytes:
        """The process's answer to a line; nothing where it has ended."""
        process = self._process
        if process is None or self._owner != os.getpid():
            process = self._process = self._start()
            self._owner = os.getpid()
        assert process.stdin is not None
        assert process.stdout is not None
        overtime = threading.Timer(_PATIENCE, process.kill)
        overtime.start()
        try:
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:  # it ended while it read
            reply = b""
        finally:
            overtime.cancel()
        if not reply.endswith(b"\n"):
            _end(process)
            self._process = None
            return b""
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable, str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us: we end it
            )
        except OSError as error:
            raise FastKVError(f"{self._path}: the chat template needs a process of its own ({error})") from None
        weakref.finalize(self, _end, process)
        first = {"path": sys.path, "template": self._source, "seconds": SECONDS}
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(json.dumps(first).encode() + b"\n")
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()
