"""What the prompts of fastkv-run are asked of, and the figures that it prints."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fastkv.console.document import Document
from fastkv.console.parser import say
from fastkv.console.prompt import Job
from fastkv.console.summary import Rows, figures

if TYPE_CHECKING:
    from fastkv.engine.generation import Generation
    from fastkv.engine.llm import LLM
    from fastkv.engine.session import Session
    from fastkv.engine.turn import Turn


class Asked:
    """What the prompts are asked of: the model itself, or a document, which is read when the first one needs it.

    source: where the policy comes from, for the figures.
    """

    def __init__(self, args: argparse.Namespace, llm: LLM, document: Document | None, source: Rows) -> None:
        self.llm, self.source = llm, source
        self._args, self._document = args, document
        self._session: Session | None = None

    @property
    def is_of_a_document(self) -> bool:
        return self._document is not None

    def session(self) -> Session | None:
        """In which the document has been read; None where there is none."""
        if self._session is None and self._document is not None:
            self._session, (policy, *rows) = self._document.open(self.llm, self.llm.policy)
            if not self._args.quiet:
                print_figures([policy, *self.source, *rows])
        return self._session

    def prompt(self, job: Job) -> str | list[int] | Turn:
        """A prompt as the model is to see it."""
        session = self.session()
        if session is not None and self._document is not None:
            return self._document.turn(session, job.prompt)
        if not self._args.chat:
            return job.prompt
        messages = [] if self._args.system is None else [{"role": "system", "content": self._args.system}]
        return self.llm.chat([*messages, {"role": "user", "content": job.prompt}], **self._args.chat_arg)

    def about(self) -> dict[str, str | None]:
        """What a record says of the document. One that is read here is known without being read."""
        if self._document is None:
            return {"context": None, "context_sha256": None}
        return {**self._document.about(self.session() if self._document.text is None else None)}

    def print_figures(self, stream: Generation) -> None:
        """Those of an answer; the policy stands with those of the document, where there is one."""
        policy, *others = figures(stream.output())
        if not self._args.quiet:
            print_figures([policy, *self.source, *others] if self._document is None else others)


def print_figures(rows: Rows) -> None:
    """On stderr, one line each."""
    for label, value in rows:
        say(f"{label:<12} {value}")
