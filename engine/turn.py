"""Turn: a prompt that continues a session, as the engine takes it in place of a plain prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastkv.cache.policy import Policy
from fastkv.cache.snapshot import Snapshot
from fastkv.engine.plan import keeping_all
from fastkv.models.llama import Llama


@dataclass(frozen=True)
class Held:
    """What a sequence has come to: ids are all its tokens; `snapshot` has the entries of the first `fed` of them.

    The last token of an answer has been made, but not been read yet: it goes before the next prompt.
    """

    ids: tuple[int, ...] = ()
    fed: int = 0
    snapshot: Snapshot | None = None

    @property
    def waiting(self) -> tuple[int, ...]:
        """The tokens that have no entries yet."""
        return self.ids[self.fed :]


class Owner(Protocol):
    """Who is told what becomes of a turn."""

    @property
    def model(self) -> Llama:
        """Whose entries it holds."""

    def begin(self, turn: Turn) -> None:
        """It is about to run. Raises FastKVError where it cannot: the session has gone on meanwhile."""

    def end(self, turn: Turn, after: Held | None, text: str) -> None:
        """It has run: what the sequence has come to (None: it failed, or nothing was read), and the answer's text."""


@dataclass(frozen=True, eq=False)
class Turn:
    """A prompt for a session. What makes one is Session.turn; LLM.generate and LLM.stream take it as a prompt.

    before: what the session held when the turn was made. held: what it continues, which is that or its beginning.
    prompt: a text, or token ids. policy: the session's; compress: whether it chooses anew what is kept; else what is
    there stays, and prompt and answer are kept whole. tail, ends: see ChatIds. note: is given the answer's text. keep:
    whether the session goes on with this turn; else it stays as it is, and any number of such turns may run at once.
    """

    owner: Owner = field(repr=False)
    before: Held = field(repr=False)
    held: Held = field(repr=False)
    prompt: str | Sequence[int]
    policy: Policy
    compress: bool
    tail: int = 0
    ends: frozenset[int] = frozenset()
    note: Callable[[str], None] | None = field(default=None, repr=False)
    keep: bool = True

    @property
    def working_policy(self) -> Policy:
        """What decides how the prompt is kept."""
        return self.policy if self.compress else keeping_all(self.policy)
