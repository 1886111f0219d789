"""`tokenizer.json`, through the tokenizers library."""

from __future__ import annotations

from pathlib import Path

from fastkv.errors import FastKVError


class JsonVocabulary:
    """A Vocabulary (tokenizer.py) read from tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exceptions, and panics that are not even these
            raise FastKVError(f"{path}: not a tokenizer that can be read ({error}); download it again") from None
        # Limits stored in the file are for training batches; a prompt is never cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._limit = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        known = [i for i in ids if 0 <= i < self._limit and self._tokenizer.id_to_token(i) is not None]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def template_ends(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        added = self._tokenizer.encode("", add_special_tokens=True).ids
        if not added:
            return False, False
        return added[0] == bos, added[-1] == eos and bos != eos
