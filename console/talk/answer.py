"""One message and its answer, which is printed as it comes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from fastkv.console.parser import say
from fastkv.console.talk.conversation import Conversation
from fastkv.console.talk.interrupt import Stop
from fastkv.console.words import counted

if TYPE_CHECKING:
    from fastkv.engine.generation import Generation
    from fastkv.engine.output import Output
    from fastkv.engine.turn import Turn


def answer(talk: Conversation, message: str) -> None:
    """Send a message. Ctrl-C ends the answer, which stays as far as it came; before it began, it takes all back.

    Only on a terminal: a pipe's conversation ends with KeyboardInterrupt then. Raises FastKVError for a message that
    does not fit, and for a fault; then the message has not been said.
    """
    with Stop(talk.on_terminal) as stop:
        try:
            turn = talk.turn(message)
            _tell_before(talk, turn)
            output = _printed(talk, talk.llm.stream(turn, talk.params), stop)
        except KeyboardInterrupt:
            if not talk.on_terminal:
                raise
            output = None
        if output is None:
            say("")  # the terminal has written ^C
            say("[nothing was answered, and the message is not part of the conversation]")
        elif stop.asked:
            say("[stopped; the conversation has the answer so far]")
        elif output.finish_reason == "length" and not talk.quiet:
            length = counted(len(output.token_ids), "token")
            say(f"[cut after {length}: --max-tokens, or the end of the model's context]")


def _printed(talk: Conversation, stream: Generation, stop: Stop) -> Output | None:
    """The answer, written piece by piece; what the session has of it."""
    last = ""
    try:
        for piece in stream:
            stop.gently()
            if piece.text:
                last = piece.text
                sys.stdout.write(last)
                sys.stdout.flush()
            if stop.asked:
                break
    except KeyboardInterrupt:
        if not talk.on_terminal:
            raise
    finally:
        stop.gently()
        output = talk.take(stream)
        if output is not None and not last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return output


def _tell_before(talk: Conversation, turn: Turn) -> None:
    """What a person who waits should know before a long text is read."""
    from fastkv.engine.plan import chooses_again

    n_tokens = len(turn.held.waiting) + len(turn.prompt)
    past, n_layers = turn.held.snapshot, talk.llm.config.n_layers
    if turn.before.ids and not turn.held.ids:
        say("[the template writes the conversation otherwise than it was read: all of it is read again]")
    if turn.compress and past is not None and not chooses_again(turn.policy, n_layers, n_tokens, past):
        say(f"[policy {turn.policy.name} chooses only as a conversation begins: this is kept whole]")
    if talk.files and talk.on_terminal and not talk.quiet:
        say(f"[reading {counted(n_tokens, 'token')}]")
