"""`tokenizer.model`, through the sentencepiece library, with the special tokens that Hugging Face keeps beside it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError
from fastkv.models.files import check_ordinary
from fastkv.models.text.native import guarded_call
from fastkv.models.text.special_tokens import AddedToken, SpecialTokens
from fastkv.models.text.token_bytes import bytes_of_fallback

_OTHER = "\0"  # the token that stands for any text between added tokens
_GUARD = "<unk>"  # spelled out by sentencepiece, in pieces that hardly any text joins


class SentencePieceVocabulary:
    """A Vocabulary (tokenizer.py) read from tokenizer.model.

    sentencepiece itself never finds a special token inside a text, so the text is cut at them first. In
    tokenizer_config.json, `legacy` says whether a piece of text after a special token gets a leading space, as the
    first does, and `add_prefix_space: false` that none does.
    """

    def __init__(self, path: Path, tokens: SpecialTokens) -> None:
        self.path = path
        import sentencepiece

        check_ordinary(path)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # OSError or RuntimeError, by what is broken
            raise FastKVError(f"{path}: not a sentencepiece model ({error}); download it again") from None
        self._size = self._pieces.vocab_size()
        self._legacy = tokens.config.flag("legacy", True)
        self._prefix = tokens.config.flag("add_prefix_space", True)
        self._guard = self._pieces.encode(_GUARD)
        ids = self._ids(tokens.added)
        control = {self._pieces.id_to_piece(i): i for i in range(self._size) if self._pieces.is_control(i)}
        self._special = control | {token.text: ids[token.text] for token in tokens.added if token.special}
        self._ids_of = control | ids
        self._text_of = {ids[token.text]: token.text for token in tokens.added if not token.special}
        self._hidden = {self._pieces.unk_id(), *self._special.values()}
        unstated = [AddedToken(text, special=True) for text in control if text not in ids]
        self._cutter = _cutter([*unstated, *tokens.added])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start, end, token in self._parts(text):
            ids += [self._ids_of[token]] if token else self._encode_plain(text[start:end], first=start == 0)
        return ids

    def _parts(self, text: str) -> Iterator[tuple[int, int, str | None]]:
        """Where each part of a text begins and ends, and the added token that it is, if it is one."""
        with guarded_call(quiet=False):
            found = self._cutter.encode(text, add_special_tokens=False)
        for number, (start, end) in zip(found.ids, found.offsets, strict=True):
            yield start, end, self._cutter.id_to_token(number) if number else None

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if self._begins_anew(first):
            return self._pieces.encode(text)
        # After some other text it keeps its spaces as they are; the other text is cut off again.
        return self._pieces.encode(_GUARD + text)[len(self._guard) :]

    def _begins_anew(self, first: bool) -> bool:
        return self._prefix and (first or self._legacy)

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i not in self._hidden and (0 <= i < self._size or i in self._text_of)]
        parts: list[str] = []
        for added, group in groupby(known, key=self._text_of.__contains__):
            run = list(group)
            parts.append("".join(map(self._text_of.__getitem__, run)) if added else self._decode(run, not parts))
        return "".join(parts)

    def _decode(self, run: list[int], first: bool) -> str:
        if self._begins_anew(first):
            return self._pieces.decode(run)
        return self._pieces.decode(self._guard + run)[len(self._pieces.decode(self._guard)) :]

    def id_of(self, token: str) -> int | None:
        return self._ids_of.get(token, self._piece(token))

    def special_id(self, token: str) -> int | None:
        return self._special.get(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._hidden

    def bytes_of(self, token_id: int) -> bytes | None:
        if token_id in self._hidden or not (0 <= token_id < self._size or token_id in self._text_of):
            return None
        if token_id in self._text_of or not self._pieces.is_byte(token_id):
            return b""
        return bytes_of_fallback(self._pieces.id_to_piece(token_id))

    def frame(self, bos: int | None) -> tuple[list[int], list[int]]:
        # Llama's slow tokenizer, whose file this is, puts BOS first unless tokenizer_config.json says otherwise.
        return ([] if bos is None else [bos]), []

    def default(self, name: str) -> str | None:
        """The token that the file itself has under a name such as `bos_token`."""
        ids = {"bos_token": self._pieces.bos_id, "eos_token": self._pieces.eos_id, "unk_token": self._pieces.unk_id}
        token_id = ids[name]() if name in ids else -1
        return self._pieces.id_to_piece(token_id) if token_id >= 0 else None

    def _piece(self, token: str) -> int | None:
        token_id = self._pieces.piece_to_id(token)
        return token_id if self._pieces.id_to_piece(token_id) == token else None

    def _ids(self, tokens: tuple[AddedToken, ...]) -> dict[str, int]:
        """The id of each: as stated, or that of the piece that it is, or the next one that is free."""
        free = max([self._size, *(1 + token.token_id for token in tokens if token.token_id is not None)])
        ids: dict[str, int] = {}
        for token in tokens:
            token_id = self._piece(token.text) if token.token_id is None else token.token_id
            if token_id is None:
                token_id, free = free, free + 1
            ids[token.text] = token_id
        return ids


def _cutter(tokens: list[AddedToken]) -> Any:
    """A tokenizer of the tokenizers library that knows nothing but the added tokens, whose rules are the library's.

    Token 0 is any text between them.
    """
    import tokenizers
    from tokenizers.models import WordLevel

    cutter = tokenizers.Tokenizer(WordLevel({_OTHER: 0}, unk_token=_OTHER))
    cutter.add_tokens([token.for_library() for token in tokens])
    return cutter
