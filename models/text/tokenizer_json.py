"""`tokenizer.json`, through the tokenizers library, with the tokens that other files add to it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from fastkv.errors import FastKVError
from fastkv.models.fields import Fields
from fastkv.models.files import check_ordinary
from fastkv.models.text.growth import MOST, PARTS, frame_length, growth, may_panic
from fastkv.models.text.native import LibraryError, guarded_call
from fastkv.models.text.special_tokens import AddedToken, SpecialTokens
from fastkv.models.text.token_bytes import bytes_of_fallback, bytes_of_text

_log = logging.getLogger(__name__)
# Where a file is looked at before the library reads it: it may run the normalizer on tokens while it loads, or crash on
# a list of pieces; or the file is written so that this cannot be told.
_LOOKED_AT = re.compile(rb'"normalized"\s*:\s*true|"vocab"\s*:\s*\[|\\u00')
_LONGEST_PIECE = 10_000  # characters; the library takes a list of pieces apart by recursion, one level for each byte
_LARGEST_ID = 2**32 - 1  # of the library
_PREFIXED = ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer")  # classes that follow add_prefix_space


class JsonVocabulary:
    """A Vocabulary (tokenizer.py) read from tokenizer.json."""

    def __init__(self, path: Path, tokens: SpecialTokens | None = None) -> None:
        self.path = path
        tokens = SpecialTokens.of(Fields({}, str(path))) if tokens is None else tokens
        self._tokenizer = _read(path)
        self._quiet = any(may_panic(_state(getattr(self._tokenizer, part))) for part in PARTS)
        # Limits stored in the file are for training batches; a prompt is never cut.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        with guarded_call():
            _set_prefix_space(self._tokenizer, tokens)
            self._add(tokens.added)
            added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._added = set(added)
        kinds = _kinds(_state(self._tokenizer.decoder))
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds

    def encode(self, text: str) -> list[int]:
        with guarded_call(self._quiet):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with guarded_call(self._quiet):
            known = [i for i in ids if 0 <= i <= _LARGEST_ID and self._tokenizer.id_to_token(i) is not None]
            return self._tokenizer.decode(known, skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def special_id(self, token: str) -> int | None:
        return self._special.get(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def bytes_of(self, token_id: int) -> bytes | None:
        text = self._tokenizer.id_to_token(token_id) if 0 <= token_id <= _LARGEST_ID else None
        if text is None or token_id in self._special_ids:
            return None
        if token_id in self._added or not (self._byte_level or self._byte_fallback):
            return b""
        return bytes_of_text(text) if self._byte_level else bytes_of_fallback(text)

    def frame(self, bos: int | None) -> tuple[list[int], list[int]]:
        with guarded_call():
            framed = self._tokenizer.encode("", add_special_tokens=True).ids
            if not framed:
                return [], []
            plain = self._tokenizer.encode("a", add_special_tokens=False).ids
            framed = self._tokenizer.encode("a", add_special_tokens=True).ids
        ends = (place + len(plain) for place in range(len(framed) - len(plain) + 1))
        end = next((end for end in ends if framed[end - len(plain) : end] == plain), None)
        return ([], []) if end is None else (framed[: end - len(plain)], framed[end:])

    def default(self, name: str) -> str | None:
        return None

    def _add(self, tokens: tuple[AddedToken, ...]) -> None:
        """Let the library know tokens that the file does not have, or has with other rules."""
        self._tokenizer.add_tokens([token.for_library() for token in tokens])
        for token in tokens:
            given = self._tokenizer.token_to_id(token.text)
            if token.token_id not in (None, given):
                _log.warning(
                    "%s: token %r has id %s there, but %d by the files beside it, which is not used",
                    *(self.path, token.text, given, token.token_id),
                )


def _read(path: Path) -> Any:
    """The library's tokenizer. Raises FastKVError for a file that it cannot read, and for one that must not be run."""
    from tokenizers import Tokenizer

    check_ordinary(path)
    try:
        data = path.read_bytes()
        stated = json.loads(data) if _LOOKED_AT.search(data) else None
    except OSError as error:
        raise FastKVError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FastKVError(f"{path}: not valid JSON ({error}); download it again") from None
    if isinstance(stated, dict):
        _check_growth(path, stated)
        _check_pieces(path, stated.get("model"))
    try:
        with guarded_call():
            tokenizer = Tokenizer.from_buffer(data)
    except LibraryError as error:
        raise FastKVError(
            f"{path}: the tokenizers library cannot read it ({error}); it may be of a newer release: "
            "pip install --upgrade tokenizers; or download it again"
        ) from None
    _check_growth(path, {part: _state(getattr(tokenizer, part)) for part in PARTS})
    return tokenizer


def _check_growth(path: Path, stated: dict[str, Any]) -> None:
    try:
        factor, around = growth(stated), frame_length(stated.get("post_processor"))
    except RecursionError:
        raise FastKVError(f"{path}: has steps inside steps inside steps; download it again") from None
    if factor > MOST:
        raise FastKVError(f"{path}: its steps can make a text {factor:.3g} times longer; take another tokenizer")
    if around > MOST:
        raise FastKVError(f"{path}: its post-processor puts {around:,} tokens around a text; take another tokenizer")


def _check_pieces(path: Path, model: Any) -> None:
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pieces = [each[0] for each in vocab if isinstance(each, list) and each] if isinstance(vocab, list) else []
    longest = max((len(piece) for piece in pieces if isinstance(piece, str)), default=0)
    if longest > _LONGEST_PIECE:
        raise FastKVError(f"{path}: has a token of {longest:,} characters; take another tokenizer")


def _state(part: Any) -> Any:
    """A step of the library's, as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())


def _kinds(step: Any) -> set[str]:
    """The types of a step and of those inside."""
    if not isinstance(step, dict):
        return set()
    inside = [each for value in step.values() if isinstance(value, list) for each in value]
    return {str(step.get("type"))}.union(*map(_kinds, inside))


def _set_prefix_space(tokenizer: Any, tokens: SpecialTokens) -> None:
    """Whether a text begins as after a space, where tokenizer_config.json says it and names a class that follows it."""
    wanted = tokens.config.get("add_prefix_space", None)
    name = str(tokens.config.get("tokenizer_class", "")).removesuffix("Fast")
    if wanted is None or name not in _PREFIXED:
        return
    wanted = tokens.config.flag("add_prefix_space", False)
    step = tokenizer.pre_tokenizer
    steps = list(step) if type(step).__name__ == "Sequence" else [step]
    for each in steps:
        if type(each).__name__ == "ByteLevel":
            each.add_prefix_space = wanted
        elif type(each).__name__ == "Metaspace":
            each.prepend_scheme = "first" if wanted else "never"
