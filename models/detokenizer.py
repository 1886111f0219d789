"""Streaming text: token ids in, one at a time; text out, never half a character, with its spaces right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6  # prompt tokens that are decoded along, so that a leading space survives
_BYTES = 4  # of the longest character in UTF-8
_BROKEN = "\ufffd"  # how a tokenizer shows bytes that are not (yet) a character


class Detokenizer:
    """Decodes a growing list of ids so that the pieces add up to the text that follows the prompt.

    Each step decodes a short window twice, without and with what is new, and emits the difference: a token's text can
    depend on its neighbour (sentencepiece drops the space of the first token) but not on tokens further away.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids, self._emitted = self._context(prompt)  # ids before `_emitted` are out already
        self._start = 0  # the window that is decoded anew begins here

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith(_BROKEN):
            return ""
        self._start, self._emitted = self._emitted, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, without the unfinished character that it may end with."""
        text = self._pending().rstrip(_BROKEN)
        self._start = self._emitted = len(self._ids)
        return text

    def _context(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """The prompt's last ids, and how many of them are whole: a character that it leaves unfinished is emitted.

        The whole ones must end between two characters. Where they begin matters only to tokenizers that show a run of
        bytes as broken altogether when it is cut: then they begin a byte earlier, up to three times.
        """
        for unfinished in range(min(_BYTES, len(prompt) + 1)):
            end = len(prompt) - unfinished
            for earlier in range(_BYTES):
                start = max(0, end - _CONTEXT - earlier)
                if not self._decode(list(prompt[start:end])).endswith(_BROKEN):
                    return list(prompt[start:]), end - start
        return [], 0

    def _pending(self) -> str:
        before = self._decode(self._ids[self._start : self._emitted])
        return self._decode(self._ids[self._start :])[len(before) :]
