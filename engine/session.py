"""Session: a sequence that its user holds. Read a document once, ask many things of it, go back, branch off.

Between its turns a session is a snapshot of the compressed cache and a list of token ids. A turn copies the entries
into a slot of the engine's memory, reads its prompt after them, decodes as any request does, and takes a new snapshot.
So sessions take no more than their entries while they wait, many decode together, a fork shares what it begins with,
and a turn that fails leaves everything as it was.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

from fastkv.cache.kv_cache import shortened
from fastkv.cache.policies import Compactor
from fastkv.cache.policy import Policy
from fastkv.engine.generation import Generation
from fastkv.engine.output import Metrics, Output
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.session_file import Saved, write_session
from fastkv.engine.turn import Held, Turn
from fastkv.errors import FastKVError, check_integer, check_switch
from fastkv.models.llama import Llama
from fastkv.models.text.chat import ChatIds

# Of the policies that need no question to choose by, the one that kept most answers, and costs next to nothing; with a
# fifth of the entries, as measured (docs/accuracy.md, "When the question comes later").
DEFAULT_POLICY: Policy = Compactor(kv_retention=0.2)
# Beginnings of what may follow a text: a tokenizer joins each with the end of that text in its own way.
_RESTS = ("a", " a", "\na")


class Engine(Protocol):
    """What a session asks of its LLM."""

    @property
    def model(self) -> Llama: ...

    def generate(self, prompt: Any, params: SamplingParams | None = None) -> Output: ...

    def stream(self, prompt: Any, params: SamplingParams | None = None) -> Generation: ...

    def chat(self, messages: list[dict[str, str]], /, **arguments: Any) -> ChatIds: ...


@dataclass(frozen=True)
class _Mark:
    """Where a turn began, after `n_ids` tokens. held: what there was; None where forgetting tokens brings it back."""

    n_ids: int
    held: Held | None
    messages: tuple[dict[str, str], ...]


class Session:
    """A conversation with a model, or a document that questions are asked of. Made by LLM.session.

    What is added, and what begins the session, is compressed by its policy. What is asked later is kept whole, with its
    answer: it takes nothing from what was kept of the document. compress=True lets the policy choose anew there, too,
    if it can (Policy.compresses_again; the others keep all of what comes later).

    One turn runs at a time; several sessions run together: LLM.generate takes `session.turn(prompt)` in its list of
    prompts. A turn that fails, or does not fit, changes nothing. messages: those of `chat`, dicts of role and content;
    where the last one is a user's, `chat_add` has begun it, and what is said next is the rest of it.
    """

    def __init__(self, llm: Engine, policy: Policy, system: str | None = None) -> None:
        self._llm, self.policy = llm, policy
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._held = Held()
        self._marks: list[_Mark] = []
        self._running: weakref.ref[Turn] | None = None  # a stream that everybody forgot runs no more
        self._lock = threading.Lock()

    # --- what it holds ---

    @property
    def ids(self) -> list[int]:
        """All token ids so far: what was added and asked, and the answers."""
        return list(self._held.ids)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that it holds; forks that have not gone on hold the same ones."""
        return 0 if self._held.snapshot is None else self._held.snapshot.nbytes

    @property
    def kv_entries(self) -> int:
        """Entries that it holds, over all layers and KV heads."""
        return 0 if self._held.snapshot is None else sum(self._held.snapshot.entries)

    # --- turns ---

    def turn(self, prompt: str | Sequence[int], *, compress: bool | None = None, keep: bool = True) -> Turn:
        """A prompt for this session, to be run beside others: LLM.generate([session.turn("Why?"), other.turn("Who?")]).

        prompt: a text, or token ids; only a text that begins the session gets the tokenizer's BOS. compress: whether
        the policy chooses anew what is kept; None: only where this begins the session. keep: whether the session goes
        on with this turn. False: it stays as it is, and takes no memory for what was asked and answered; any number of
        such turns may stand in one list: many questions about what the session holds.
        """
        check_switch("keep", keep)
        held = self._held
        return Turn(self, held, held, prompt, self.policy, self._compresses(held, compress), keep=keep)

    def add(self, prompt: str | Sequence[int], *, compress: bool = True) -> Metrics:
        """Read a text or token ids, and answer nothing. The figures' ttft_s is how long it took. compress: see `turn`.

        Raises FastKVError as LLM.generate does; nothing has changed then.
        """
        return self._llm.stream(self.turn(prompt, compress=compress), SamplingParams(max_tokens=1)).read_only()

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, compress: bool | None = None
    ) -> Output:
        """Continue after a prompt. See `turn`. Raises FastKVError as LLM.generate does; nothing has changed then."""
        return self._llm.generate(self.turn(prompt, compress=compress), params)

    def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, compress: bool | None = None
    ) -> Generation:
        """The same as an iterator. Closed early, or interrupted and closed, it keeps the answer so far.

        Forgotten without that, it has changed nothing.
        """
        return self._llm.stream(self.turn(prompt, compress=compress), params)

    def chat(
        self, message: str, params: SamplingParams | None = None, *, compress: bool | None = None, **arguments: Any
    ) -> Output:
        """Send a user's message by the model's chat template, and return the answer; both go into `messages`.

        arguments: variables of the template. Raises FastKVError as LLM.chat and LLM.generate do; nothing has changed
        then.
        """
        return self._llm.generate(self.chat_turn(message, compress=compress, **arguments), params)

    def chat_turn(self, message: str, *, compress: bool | None = None, keep: bool = True, **arguments: Any) -> Turn:
        """A user's message as a turn. The session's tokens are always those of one rendering of all its messages.

        What that renders otherwise than it was (an answer that the template cuts, say) is forgotten and read again; of
        a session whose compressed part would change, everything is. compress, keep: see `turn`.
        """
        check_switch("keep", keep)
        asked = self._messages_with(message)
        rendered = self._llm.chat(asked, **arguments)
        before = self._held
        held = self._held_until(_common(before.ids, rendered[:-1]))

        def note(answer: str) -> None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

        return Turn(
            owner=self,
            before=before,
            held=held,
            prompt=rendered[len(held.ids) :],
            policy=self.policy,
            compress=self._compresses(held, compress),
            tail=rendered.tail,
            ends=rendered.ends,
            note=note,
            keep=keep,
        )

    def chat_add(self, text: str, **arguments: Any) -> Metrics:
        """Read the beginning of a user's message, such as a document, and answer nothing: see `add`.

        The next `chat` or `chat_turn` is the rest of that message: all of it is then one rendering by the template, and
        only what no rest could change has been read before. arguments: variables of the template.

        Raises FastKVError as LLM.chat and LLM.generate do; nothing has changed then.
        """
        asked = self._messages_with(text)
        renderings = [self._llm.chat(self._messages_with(text + rest), **arguments) for rest in _RESTS]
        shared = renderings[0][: min(_common(renderings[0], other) for other in renderings[1:])]
        before = self._held
        held = self._held_until(_common(before.ids, shared))

        def note(_: str) -> None:
            self.messages = asked

        turn = Turn(self, before, held, shared[len(held.ids) :], self.policy, compress=True, note=note)
        return self._llm.stream(turn, SamplingParams(max_tokens=1)).read_only()

    # --- other ways on ---

    def fork(self) -> Session:
        """Another session that begins with all that this one holds. They share it: the copy takes no memory."""
        other = Session(self._llm, self.policy)
        other.messages, other._held, other._marks = [*map(dict, self.messages)], self._held, [*self._marks]
        return other

    def save(self, path: str | PathLike[str]) -> None:
        """Write the session into a file, which LLM.load_session of the same model goes on from, in any process.

        It takes the bytes of the entries, one or two more for where an entry stands that a policy chose, up to four for
        a token, and the text of the messages.
        The file takes the place of an earlier one in one step: whatever fails, and whatever else reads or writes it,
        there is one of them whole, and of several that are saved the last one stays. Ways back (`undo`) are not kept.

        Raises FastKVError, and leaves the earlier file, where it cannot be written, for a policy that is not fastkv's
        own, for entries of a kv_dtype, and while a turn runs.
        """
        if self._llm.model.ranks is not None:
            raise FastKVError("a session's file does not go with tensor_parallel, where each rank has a part of it")
        with self._lock:
            self._check_idle()
            saved = Saved(self.policy, [*map(dict, self.messages)], self._held)
        write_session(path, self._llm.model, saved)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, as if they had never been, and the messages that they belong to.

        Raises FastKVError for what is no such number, where a policy has chosen among them (a fork from before keeps a
        way back), and while a turn runs.
        """
        check_integer("count", count, 0, len(self._held.ids))
        with self._lock:
            self._check_idle()
            until = len(self._held.ids) - count
            held = self._held_until(until)
            if len(held.ids) < until:
                raise FastKVError(
                    f"the session can forget its last {self._n_whole} tokens, or all of them, not {count}: what stands "
                    "before them was compressed; undo() goes back to before a turn, and so does a fork from before it"
                )
            self._forget_turns(until)
            self._held = held

    def undo(self) -> None:
        """Go back to before the last turn (or `add`). Raises FastKVError where there was none, and while one runs."""
        with self._lock:
            self._check_idle()
            if not self._marks:
                raise FastKVError("there is no turn to undo")
            mark = self._marks[-1]
            self._held = self._held_until(mark.n_ids) if mark.held is None else mark.held
            self.messages = [*map(dict, mark.messages)]
            self._marks.pop()

    # --- what the engine asks and tells (see Owner) ---

    @property
    def model(self) -> Llama:
        """The network that its entries come from."""
        return self._llm.model

    def resume(self, saved: Saved) -> None:
        """Hold what a file has of a session: of one that is new."""
        self.messages, self._held = saved.messages, saved.held

    def begin(self, turn: Turn) -> None:
        """See Owner."""
        if not turn.keep:
            return
        with self._lock:
            self._check_idle()
            if turn.before is not self._held:
                raise FastKVError("the session has gone on since this turn was made; make it anew")
            self._running = weakref.ref(turn)

    def end(self, turn: Turn, after: Held | None, text: str) -> None:
        """See Owner."""
        with self._lock:
            if self._running is None or self._running() is not turn:
                return
            self._running = None
            if after is None:
                return
            kept = None if _comes_back(turn.before, after) else turn.before
            self._marks.append(_Mark(len(turn.before.ids), kept, (*self.messages,)))
            self._held = after
            if turn.note is not None:
                turn.note(text)

    # --- inside ---

    @property
    def _n_whole(self) -> int:
        """Tokens at the end that can be forgotten."""
        held = self._held
        return len(held.waiting) + (0 if held.snapshot is None else held.snapshot.forgettable)

    def _messages_with(self, text: str) -> list[dict[str, str]]:
        """The messages and a user's, or with the rest of the user's that they end with."""
        if not self.messages or self.messages[-1]["role"] != "user":
            return [*self.messages, {"role": "user", "content": text}]
        *earlier, begun = self.messages
        return [*earlier, {**begun, "content": begun["content"] + text}]

    def _compresses(self, held: Held, asked: bool | None) -> bool:
        if asked is None:
            return held.snapshot is None
        check_switch("compress", asked)
        return asked

    def _held_until(self, until: int) -> Held:
        """What there was when the session had that many tokens; nothing, where a policy has chosen among the others."""
        held, lost = self._held, len(self._held.ids) - until
        if lost == 0:
            return held
        if held.snapshot is None or lost > self._n_whole or until == 0:
            return Held()
        fed = min(held.fed, until)
        forgotten = held.fed - fed
        return Held(held.ids[:until], fed, shortened(held.snapshot, forgotten) if forgotten else held.snapshot)

    def _forget_turns(self, until: int) -> None:
        """Forget the turns that begin at this token or later, and the messages of one that ends later."""
        ends = [*(mark.n_ids for mark in self._marks[1:]), len(self._held.ids)]
        cut = [mark for mark, end in zip(self._marks, ends, strict=False) if end > until]
        if cut:
            self.messages = [*map(dict, cut[0].messages)]
        self._marks = [mark for mark in self._marks if mark.n_ids < until]

    def _check_idle(self) -> None:
        if self._running is not None and self._running() is not None:
            raise FastKVError("a turn of this session is running: finish or close it first, or fork the session")


def _comes_back(before: Held, after: Held) -> bool:
    """Whether forgetting tokens of what there is after a turn gives what there was before it."""
    old, new = before.snapshot, after.snapshot
    whole = old is not None and new is not None and old.whole_from == new.whole_from
    packed = new is not None and new.layout.kv_dtype is not None  # some meanwhile, perhaps
    return whole and not packed and after.ids[: len(before.ids)] == before.ids


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin alike with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
