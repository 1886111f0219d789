"""Where messages come from: a line editor on a terminal, or one line each from a pipe. Knows no model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO, Protocol

from fastkv.console.parser import say
from fastkv.console.prompt import is_broken
from fastkv.errors import FastKVError

PROMPT, MORE = "> ", "… "
_GOES_ON = "\\"


class Lines(Protocol):
    """Lines that somebody writes. on_terminal: a person does, who can be asked for more."""

    on_terminal: bool

    def line(self, prompt: str) -> str:
        """The next line, without its end. EOFError where there are no more; KeyboardInterrupt for Ctrl-C."""


class Piped:
    """Lines of a file or pipe, in UTF-8. Shows no prompt."""

    on_terminal = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._first = stream, True

    def line(self, prompt: str) -> str:
        """See Lines."""
        data = self._stream.readline()
        if not data:
            raise EOFError
        encoding, self._first = "utf-8-sig" if self._first else "utf-8", False
        return data.decode(encoding, "surrogateescape").rstrip("\r\n")


class Plain:
    """A terminal without prompt_toolkit; lines can be edited, and called back, where Python has readline.

    The prompt goes to stderr where stdout is no terminal, so that stdout stays the answers alone.
    """

    on_terminal = True

    def __init__(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  # `input` then uses it
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")

    def line(self, prompt: str) -> str:
        """See Lines."""
        try:
            if sys.stdout.isatty():
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        except (KeyboardInterrupt, EOFError):
            say("")  # what comes next begins on a line of its own
            raise


def lines_of_stdin(commands: Mapping[str, bool]) -> Lines:
    """What standard input is. commands: the names that begin a command, and whether a file's name follows, for Tab.

    FastKVError where it is closed.
    """
    if sys.stdin is None:
        raise FastKVError("standard input is closed: nobody can say anything")
    if not sys.stdin.isatty():
        return Piped(sys.stdin.buffer)
    if not sys.stdout.isatty():
        return Plain()
    try:
        from fastkv.console.talk.editor import Edited
    except ImportError:  # of prompt_toolkit, which is an extra
        return Plain()
    return Edited(commands)


def read_message(lines: Lines) -> str:
    """The next message or command: a line, and those after it as long as each ends with a backslash.

    Raises EOFError at the end, KeyboardInterrupt for Ctrl-C, FastKVError for what is no UTF-8.
    """
    parts = [lines.line(PROMPT)]
    with suppress(EOFError):  # nothing goes on any more: what there is, is the message
        while parts[-1].endswith(_GOES_ON) and not is_command(parts[0]):
            parts[-1] = parts[-1].removesuffix(_GOES_ON)
            parts.append(lines.line(MORE))
    message = "\n".join(parts)
    if is_broken(message):
        raise FastKVError("a line of the message is not UTF-8; it was left out")
    return message


def is_command(line: str) -> bool:
    """Whether a line is for the command itself, and not for the model."""
    return line.startswith("/")
