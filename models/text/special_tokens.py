"""The tokens that a model folder names or adds beside its tokenizer, from the three files that may hold them.

These are tokenizer_config.json, special_tokens_map.json (older) and added_tokens.json (older still), read as
`transformers` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastkv.models.fields import Fields

CONFIG = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_RULES = ("special", "lstrip", "rstrip", "single_word", "normalized")
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else is.

    lstrip, rstrip: it takes the white space on that side with it. single_word: not inside a word. normalized: found in
    the text after the tokenizer's normalizer. special: no part of an answer's text. token_id: None for the next one.
    """

    text: str
    token_id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    def for_library(self) -> Any:
        """The same as the tokenizers library has it."""
        import tokenizers

        return tokenizers.AddedToken(self.text, **{rule: getattr(self, rule) for rule in _RULES})


@dataclass(frozen=True)
class SpecialTokens:
    """What the files say.

    config: tokenizer_config.json. named: the texts of the tokens that have a name, such as `bos_token`; None where the
    name is there and the token is null. added: tokens that the vocabulary is to have, each text once.
    """

    config: Fields
    named: dict[str, str | None]
    added: tuple[AddedToken, ...]

    @classmethod
    def of(cls, config: Fields) -> SpecialTokens:
        """Those of a tokenizer_config.json alone."""
        return cls._of(config, Fields({}, config.source), [])

    @classmethod
    def read(cls, folder: Path) -> SpecialTokens:
        """Those of a model folder. Raises FastKVError for a file that is broken."""
        config = Fields.read_optional(folder / CONFIG)
        names = Fields.read_optional(folder / "special_tokens_map.json")
        older = Fields.read_optional(folder / "added_tokens.json")
        return cls._of(config, names, _older_table(older))

    @classmethod
    def _of(cls, config: Fields, names: Fields, older: list[AddedToken]) -> SpecialTokens:
        # The table came with the last of the formats: where it is, the older files are leftovers.
        table = _table(config)
        stated = [names, config] if table is not None else [config, names]
        tokens = {token.text: token for fields in stated for _, token in _named(fields) if token is not None}
        named: dict[str, str | None] = {}
        for fields in stated:
            named.update({name: None if token is None else token.text for name, token in _named(fields)})
        listed = {token.text: token for fields in stated for token in _listed(fields)}
        added = {token.text: token for token in (older if table is None else table)}
        for text, token in (*tokens.items(), *listed.items()):
            before = added.get(text)
            rules = token if table is None or before is None else before
            added[text] = replace(rules, token_id=None if before is None else before.token_id, special=True)
        added.pop("", None)  # what is empty is found nowhere
        return cls(config, named, tuple(added.values()))


def _table(config: Fields) -> list[AddedToken] | None:
    """`added_tokens_decoder`: id -> token."""
    table = config.section("added_tokens_decoder")
    if table is None:
        return None
    tokens = [_token(table, key, value, _id(table, key, _digits(key))) for key, value in table.values.items()]
    return sorted(tokens, key=lambda token: token.token_id or 0)


def _older_table(older: Fields) -> list[AddedToken]:
    """`added_tokens.json`: text -> id. Of these only those with a name are special."""
    tokens = [AddedToken(_text(older, text, text), _id(older, text, value)) for text, value in older.values.items()]
    return sorted((replace(token, normalized=True) for token in tokens), key=lambda token: token.token_id or 0)


def _named(fields: Fields) -> Iterator[tuple[str, AddedToken | None]]:
    """Tokens under a name; beyond the usual ones a model may name others, such as `image_token`."""
    for key, value in fields.values.items():
        if key in NAMES and value in (None, "", {"content": ""}):
            yield key, None
        elif key in NAMES or (key.endswith("_token") and isinstance(value, str)):
            yield key, replace(_token(fields, key, value), special=True)
    for listed in ("extra_special_tokens", "model_specific_special_tokens"):
        more = fields.values.get(listed)
        if isinstance(more, dict):
            yield from ((key, replace(_token(fields, key, value), special=True)) for key, value in more.items())


def _listed(fields: Fields) -> Iterator[AddedToken]:
    """Special tokens without a name."""
    for key in _LISTS:
        value = fields.get(key, [])
        if isinstance(value, dict) and key == "extra_special_tokens":
            continue
        if not isinstance(value, list):
            raise fields.complain(key, "a list of tokens")
        yield from (replace(_token(fields, key, each), special=True) for each in value)


def _token(fields: Fields, key: str, value: Any, token_id: int | None = None) -> AddedToken:
    """Given as a text, or as an object with `content` and what else is said of it."""
    if isinstance(value, str) and token_id is None:
        return AddedToken(_text(fields, key, value))
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        wanted = "an object with 'content', under a token id" if token_id is not None else "a string"
        raise fields.complain(key, wanted)
    stated = Fields({name: value.get(name) for name in _RULES}, f"{fields.source}: {key}")
    rules = {name: stated.flag(name, False) for name in _RULES}
    rules["normalized"] = stated.flag("normalized", not rules["special"])
    return AddedToken(_text(fields, key, value["content"]), token_id, **rules)


def _text(fields: Fields, key: str, text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise fields.complain(key, "a text without halves of surrogate pairs")
    return text


def _digits(key: str) -> int | None:
    """A token id that is the key of an object. None for what is no number, or a very long one."""
    return int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else None


def _id(fields: Fields, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_ID:
        raise fields.complain(key, f"a token id, at most {_LARGEST_ID}, with its text")
    return value
