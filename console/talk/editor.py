"""The line editor of prompt_toolkit, which is the extra `chat`. Imported where it is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document


class Edited:
    """Lines of a terminal. Their history is that of this conversation: no file has it."""

    on_terminal = True

    def __init__(self, commands: Mapping[str, bool]) -> None:
        self._session: PromptSession[str] = PromptSession(completer=_Names(commands), complete_while_typing=False)

    def line(self, prompt: str) -> str:
        """See Lines (lines.py)."""
        return self._session.prompt(prompt)


class _Names(Completer):
    """What Tab writes: the rest of a command's name, or of a file's after it."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        name, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            found = [each for each in self._commands if name and each.startswith(name)]
            for each in found:
                yield Completion(each + " " * self._commands[each], start_position=-len(name))
        elif self._commands.get(name):
            yield from self._paths.get_completions(Document(rest, len(rest)), complete_event)
