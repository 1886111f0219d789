"""`tokenizer.model`, through the sentencepiece library, with the special tokens that Hugging Face keeps beside it."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from fastkv.errors import FastKVError
from fastkv.models.fields import Fields

_GUARD = "<unk>"  # spelled out by sentencepiece, in pieces that hardly any text joins


class SentencePieceVocabulary:
    """A Vocabulary (tokenizer.py) read from tokenizer.model.

    sentencepiece itself never finds a special token inside a text, so the text is cut at them first. `legacy` in
    tokenizer_config.json says whether a piece of text after a special token gets a leading space, as the first does.
    """

    def __init__(self, path: Path, fields: Fields) -> None:
        self.path = path
        import sentencepiece

        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # OSError or RuntimeError, by what is broken
            raise FastKVError(f"{path}: not a sentencepiece model ({error}); download it again") from None
        self._size = self._pieces.vocab_size()
        self._added = _added_tokens(path.parent, fields)
        self._text_of = {token_id: text for text, (token_id, special) in self._added.items() if not special}
        self._special = {text: token_id for text, (token_id, _) in self._added.items()}
        hidden = {i for i in range(self._size) if self._pieces.is_control(i)}
        self._special.update({self._pieces.id_to_piece(i): i for i in hidden})
        self._hidden = hidden | {self._pieces.unk_id()} | {i for i, special in self._added.values() if special}
        self._cut = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)")
        self._legacy = fields.flag("legacy", True)
        self._guard = self._pieces.encode(_GUARD)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._cut.finditer(text):
            ids += self._encode_plain(text[start : match.start()], first=start == 0)
            ids.append(self._special[match.group()])
            start = match.end()
        return ids + self._encode_plain(text[start:], first=start == 0)

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        if not text or first or self._legacy:
            return self._pieces.encode(text) if text else []
        # After some other text it keeps its spaces as they are; the other text is cut off again.
        return self._pieces.encode(_GUARD + text)[len(self._guard) :]

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if i not in self._hidden and (0 <= i < self._size or i in self._text_of)]
        parts: list[str] = []
        for added, group in groupby(known, key=self._text_of.__contains__):
            run = list(group)
            parts.append("".join(map(self._text_of.__getitem__, run)) if added else self._decode(run, not parts))
        return "".join(parts)

    def _decode(self, run: list[int], first: bool) -> str:
        if first or self._legacy:
            return self._pieces.decode(run)
        return self._pieces.decode(self._guard + run)[len(self._pieces.decode(self._guard)) :]

    def id_of(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        token_id = self._pieces.piece_to_id(token)
        return token_id if self._pieces.id_to_piece(token_id) == token else None

    def token_of(self, token_id: int) -> str | None:
        for text, (added, _) in self._added.items():
            if added == token_id:
                return text
        return self._pieces.id_to_piece(token_id) if 0 <= token_id < self._size else None

    def template_ends(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        # Llama's slow tokenizer, whose file this is, puts BOS first unless tokenizer_config.json says otherwise.
        return bos is not None, False


def _added_tokens(folder: Path, fields: Fields) -> dict[str, tuple[int, bool]]:
    """text -> (id, special) of the tokens that were added to the sentencepiece vocabulary afterwards."""
    added: dict[str, tuple[int, bool]] = {}
    for text, token_id in Fields.read_optional(folder / "added_tokens.json").values.items():
        if not isinstance(token_id, int):
            raise FastKVError(f"{folder / 'added_tokens.json'}: the id of {text!r} must be a whole number")
        added[text] = (token_id, True)
    table = fields.section("added_tokens_decoder") or Fields({}, fields.source)
    for key, token in table.values.items():
        if not key.isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise table.complain(key, "an object with 'content', under a token id")
        added[token["content"]] = (int(key), bool(token.get("special", False)))
    return added
