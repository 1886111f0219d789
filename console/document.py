"""The document that questions are asked of: a text that is read once, or a file of what was read before."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkv.cache.catalogue import SETTINGS
from fastkv.console.files import check_readable, check_replaceable
from fastkv.console.parser import flag_of
from fastkv.console.prompt import digest, read_prompt, without_last_newline
from fastkv.console.summary import Rows, context_figures, saved_figure
from fastkv.errors import FastKVError, brief, writable

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.llm import LLM
    from fastkv.engine.session import Session
    from fastkv.engine.turn import Turn

BETWEEN = "\n\n"  # a document and its question, in one message of a chat


@dataclass(frozen=True)
class Document:
    """What --context or --cache named. text: of the context; None where `name` is the file of a saved session.

    chat: whether document and question are one message of the model's chat template. save_to: a file for the session.
    """

    name: str
    text: str | None
    chat: bool = False
    system: str | None = None
    chat_arg: dict[str, Any] = field(default_factory=dict)
    save_to: str | None = None

    def open(self, llm: LLM, policy: Policy | None) -> tuple[Session, Rows]:
        """The session in which it has been read, saved if that is wanted; and figures: label, text.

        policy: None for a saved session, which has its own. Raises FastKVError, naming the flag, for a text that does
        not fit, and for a file that holds no session of this model.
        """
        started = time.perf_counter()
        session = self._loaded(llm) if self.text is None else self._read(llm, self.text, policy)
        seconds = time.perf_counter() - started
        how = "loaded" if self.text is None else "read"
        rows = context_figures(llm, session, f"of {self._shown}, {how} in {seconds:.3f} s")
        if self.save_to is not None:
            try:
                session.save(self.save_to)
            except FastKVError as error:
                raise type(error)(str(error), setting="save_cache") from None
            rows.append(saved_figure(self.save_to))
        return session, rows

    def turn(self, session: Session, question: str) -> Turn:
        """A question that the session does not go on from, so that many can be asked at once."""
        if self.chat:
            return session.chat_turn(question, keep=False, **self.chat_arg)
        return session.turn(question, keep=False)

    def about(self, session: Session | None) -> dict[str, str]:
        """What a record says of it. session: needed only where it was saved: the text is known from its tokens."""
        held = json.dumps([] if session is None else [session.ids, session.messages])
        return {"context": writable(self.name), "context_sha256": digest(held if self.text is None else self.text)}

    @property
    def _shown(self) -> str:
        return "standard input" if self.name == "-" else self.name

    def _read(self, llm: LLM, text: str, policy: Policy | None) -> Session:
        session = llm.session(policy, system=self.system)
        try:
            if self.chat:
                session.chat_add(without_last_newline(text) + BETWEEN, **self.chat_arg)
            else:
                session.add(text)
        except FastKVError as error:
            if error.setting != "prompt":
                raise
            raise FastKVError(f"{self._shown}: {error}", setting="context") from None
        return session

    def _loaded(self, llm: LLM) -> Session:
        try:
            session = llm.load_session(self.name)
        except FastKVError as error:
            raise type(error)(str(error), setting="cache") from None
        if self.chat != bool(session.messages):
            said, advice = ("with", "add --chat") if session.messages else ("without", "leave --chat out")
            raise FastKVError(f"{self.name}: was read {said} --chat: {advice}", setting="cache")
        llm.policy = session.policy  # which records tell
        return session


def document_of(args: argparse.Namespace) -> Document | None:
    """The document that flags of fastkv-run name, its text read; None where they name none.

    Raises FastKVError for flags that do not go with it, and for a file that is not there or no text.
    """
    if args.context is None and args.cache is None:
        if args.save_cache is not None:
            raise FastKVError("--save-cache writes what --context has read: add --context, or leave it out")
        return None
    if args.context is not None and args.cache is not None:
        raise FastKVError("--cache has a context already: leave it or --context out")
    for name in ("cache", "save_cache"):
        if getattr(args, name) in ("", "-"):
            raise FastKVError(f"{flag_of(name)} takes the name of a file, not {brief(getattr(args, name))}")
    if args.kv_dtype is not None and (args.cache or args.save_cache):
        raise FastKVError("entries of a file are in the model's dtype: leave it out", setting="kv_dtype")
    if args.report is not None:
        raise FastKVError("--report shows a prompt that is read as one: leave it, or --context and --cache out")
    given = {"chat": args.chat, "system": args.system, "chat_arg": args.chat_arg}
    if args.cache is not None:
        _refuse_beside_cache(args, ("policy", "policy_file", *SETTINGS), "its policy")
        _refuse_beside_cache(args, ("system",), "its system message")
        if args.save_cache is not None:
            raise FastKVError("--save-cache writes what --context has read, and --cache has been written already")
        check_readable(Path(args.cache), "cache")
        return Document(args.cache, None, **given)
    if [args.context, *args.prompt].count("-") > 1:
        raise FastKVError("--context and --prompt cannot both read standard input; give one of them a file")
    text = read_prompt(args.context, "--context", whole=True)
    return Document(args.context, text, save_to=args.save_cache, **given)


def check_save_cache(path: str, inputs: Iterable[str | None]) -> None:
    """FastKVError, before the model is loaded, unless the session can be written there, over none of the inputs."""
    check_replaceable(Path(path), "save_cache")
    for name in inputs:
        if name is not None and (os.path.realpath(name) == os.path.realpath(path) or _is_same_file(name, path)):
            raise FastKVError(
                f"{path}: is read or written by another flag, too; take another file", setting="save_cache"
            )


def _is_same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _refuse_beside_cache(args: argparse.Namespace, names: Iterable[str], what: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise FastKVError(f"{flag_of(name)}: what --cache names has {what} already: leave one of them out")
