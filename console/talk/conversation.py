"""Conversation: a session, and what goes along with its next message. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.console.prompt import text_of
from fastkv.errors import FastKVError
from fastkv.storage import is_odd

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.generation import Generation
    from fastkv.engine.llm import LLM
    from fastkv.engine.output import Output
    from fastkv.engine.sampler import SamplingParams
    from fastkv.engine.session import Session
    from fastkv.engine.turn import Turn


@dataclass
class Conversation:
    """What the command is talking about.

    arguments: variables of the chat template. files: names and texts that go along with the next message. last: the
    latest answer. on_terminal: a person reads along. quiet: says only what is asked for. over: the user has left.
    """

    llm: LLM
    session: Session
    params: SamplingParams
    arguments: dict[str, Any]
    on_terminal: bool = False
    quiet: bool = False
    files: list[tuple[str, str]] = field(default_factory=list)
    last: Output | None = None
    over: bool = False
    _n_messages: int = 0  # before the latest turn
    _n_loaded: int = 0  # messages of the file that the conversation began with

    def turn(self, message: str) -> Turn:
        """The waiting files and a message, as a turn. With files the policy chooses what is kept, without them as the
        session does. Raises FastKVError as Session.chat_turn does.
        """
        self._n_messages = len(self.session.messages)
        content = "\n\n".join([*(text for _, text in self.files), message])
        return self.session.chat_turn(content, compress=True if self.files else None, **self.arguments)

    def take(self, stream: Generation) -> Output | None:
        """Close the stream of the latest turn. What it has answered, which the session knows then.

        None if that is nothing: session and files are as they were.
        """
        stream.close()
        if len(self.session.messages) == self._n_messages:
            self.session = self.session.fork()  # an interrupt at a bad moment would leave it waiting for the turn
            return None
        output = stream.output()
        if not output.token_ids:
            self.session.undo()
            return None
        self.files.clear()
        self.last = output
        return output

    @property
    def can_undo(self) -> bool:
        """Whether the last message was said here; a file of a session has no ways back."""
        return len(self.session.messages) > self._n_loaded

    def read_file(self, path: Path) -> str:
        """A file's text, which goes along with the next message. Raises FastKVError for what is no text."""
        try:
            if is_odd(path):
                raise FastKVError(f"{path}: cannot be read, for it is no ordinary file")
            data = path.read_bytes()
        except OSError as error:
            raise FastKVError(f"{path}: cannot be read ({error.strerror})") from None
        text = text_of(data, str(path))
        self.files.append((str(path), text))
        return text

    def load(self, path: Path) -> None:
        """Go on with a saved session. FastKVError, and the one there is stays, where it holds no conversation."""
        found = self.llm.load_session(path)
        if found.ids and not any(each["role"] == "user" for each in found.messages):
            raise FastKVError(f"{path}: holds a text and no conversation; fastkv-run --cache asks about it")
        self.session, self.last = found, None
        self._n_loaded = len(found.messages)

    def set_policy(self, policy: Policy) -> None:
        """What is read from now on is kept by it. FastKVError where it does not fit the model, or no session."""
        self.session.policy = self.llm.session(policy).policy
