"""Streaming text: token ids in, one at a time; text out, never half a character, with its spaces right."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_CONTEXT = 6  # prompt tokens that are decoded along, so that a leading space survives
_BYTES = 4  # of the longest character in UTF-8
_SILENT = 16  # tokens without a text in a row that are decoded along; no character is that long
_BROKEN = "\ufffd"  # how a tokenizer shows bytes that are not a character


class Decoder(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """Their text. What says nothing, special tokens for example, decodes to nothing."""

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token that may hold a part of a character; b"" of one that holds whole ones only, None of one
        that says nothing.
        """


class Detokenizer:
    """Decodes a growing list of ids so that the pieces add up to the text that follows the prompt.

    Each step decodes a short window twice, without and with what is new, and emits the difference: a token's text can
    depend on its neighbour (sentencepiece drops the space of the first token) but not on tokens further away. Only the
    tokens of an unfinished character are held back, which are three at most.
    """

    def __init__(self, tokenizer: Decoder | None, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids, self._emitted = self._context(list(prompt))  # ids before `_emitted` are out already
        self._start = 0  # the window that is decoded anew begins here

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        self._ids.append(token_id)
        end = len(self._ids) - self._unfinished(self._ids)
        text = self._text_until(end)
        if text:
            self._start, self._emitted = self._emitted, end
        elif len(self._ids) - self._emitted > _SILENT:
            del self._ids[self._emitted + _SILENT // 2]  # it says nothing, and each one makes the next one dearer
        return text

    def flush(self) -> str:
        """What is left at the end, without the unfinished character that it may end with."""
        text = self._text_until(len(self._ids))
        self._start = self._emitted = len(self._ids)
        return text.rstrip(_BROKEN) if text else ""

    def _context(self, prompt: list[int]) -> tuple[list[int], int]:
        """The prompt's last ids, and how many of them are whole: a character that it leaves unfinished is emitted.

        The whole ones begin between two characters: some tokenizers show a run of bytes that is cut inside one as
        broken altogether.
        """
        end = len(prompt) - self._unfinished(prompt)
        start = max(0, end - _CONTEXT)
        earliest = max(0, start - _BYTES)
        while start > earliest and self._unfinished(prompt[:start]):
            start -= 1
        return prompt[start:], end - start

    def _unfinished(self, ids: list[int]) -> int:
        """How many of the last ids share in a character whose last byte is not there yet."""
        if self._tokenizer is None:
            return 0
        pieces: list[bytes] = []
        for token_id in reversed(ids[-_SILENT:]):
            piece = self._tokenizer.bytes_of(token_id)
            if piece == b"" or sum(map(len, pieces)) >= _BYTES - 1:
                break
            pieces.append(piece or b"")  # what says nothing stands between the bytes of a character as well
        left, count = _unfinished_bytes(b"".join(reversed(pieces))), 0
        while left > 0:
            left -= len(pieces[count])
            count += 1
        return count

    def _text_until(self, end: int) -> str:
        if self._tokenizer is None or end <= self._emitted:
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._emitted])
        return self._tokenizer.decode(self._ids[self._start : end])[len(before) :]


def _unfinished_bytes(data: bytes) -> int:
    """How many bytes at the end begin a character in UTF-8 and do not end it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])
