"""Text <-> token ids through one small interface: `tokenizer.json` (tokenizers) or `tokenizer.model` (sentencepiece).

Knows the BOS and EOS rules that a model folder states. Knows nothing of streaming or chat (detokenizer.py, chat.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

from fastkv.errors import FastKVError
from fastkv.models.chat import ChatIds, ChatTemplate, written_after
from fastkv.models.config import ModelConfig
from fastkv.models.fields import Fields


class Vocabulary(Protocol):
    """What the two libraries have in common. Special tokens in a text are recognised, none are added."""

    path: Path

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str:
        """Special tokens, and ids outside the vocabulary, decode to nothing."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def token_of(self, token_id: int) -> str | None: ...

    def template_ends(self, bos: int | None, eos: int | None) -> tuple[bool, bool]:
        """Whether the tokenizer's own file puts BOS before, and EOS after, a text."""
        ...


class Tokenizer:
    """A model's tokenizer. `bos_id` and `eos_ids` come from the tokenizer's and the model's own files."""

    def __init__(self, vocabulary: Vocabulary, fields: Fields, config: ModelConfig, chat: ChatTemplate | None) -> None:
        self._vocabulary = vocabulary
        self._chat = chat
        self._fields = fields
        eos = self._special("eos_token")
        self.bos_id = self._special("bos_token", config.bos_token_id)
        self.eos_ids = frozenset([*config.eos_token_ids, *([] if eos is None else [eos])])
        self._eos_id = eos if eos is not None else next(iter(config.eos_token_ids), None)
        adds_bos, adds_eos = vocabulary.template_ends(self.bos_id, self._eos_id)
        self._prefix = self._end("add_bos_token", adds_bos, "bos_token", self.bos_id)
        self._suffix = self._end("add_eos_token", adds_eos, "eos_token", self._eos_id)

    @classmethod
    def from_pretrained(cls, folder: Path, config: ModelConfig) -> Tokenizer | None:
        """The tokenizer of a model folder, or None where it has none.

        `tokenizer.json` wins over `tokenizer.model`; a broken one raises FastKVError and is never passed over.
        """
        fields = Fields.read_optional(folder / "tokenizer_config.json")
        # lexists: a folder or a link that leads nowhere is broken too, and no reason to take the other file
        if os.path.lexists(folder / "tokenizer.json"):
            from fastkv.models.tokenizer_json import JsonVocabulary

            vocabulary: Vocabulary = JsonVocabulary(folder / "tokenizer.json")
        elif os.path.lexists(folder / "tokenizer.model"):
            from fastkv.models.tokenizer_sentencepiece import SentencePieceVocabulary

            vocabulary = SentencePieceVocabulary(folder / "tokenizer.model", fields)
        else:
            return None
        return cls(vocabulary, fields, config, ChatTemplate.from_pretrained(folder, fields))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with BOS and EOS where the model's files ask for them."""
        return [*self._prefix, *self._encode(text), *self._suffix]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and unknown ids give nothing."""
        return self._vocabulary.decode(ids)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._chat is not None

    def encode_chat(self, messages: list[dict[str, str]]) -> ChatIds:
        """Token ids of a conversation ready for the model's answer, by the model's own chat template.

        messages: dicts with `role` and `content`. The template writes every special token itself, so none is added.
        Raises FastKVError where the model has no template, or where the template refuses the messages.
        """
        if self._chat is None:
            folder = Path(self._fields.source).parent
            raise FastKVError(f"{folder}: no chat template (chat_template.jinja), so no chat", setting="chat")
        text = self._chat.render(messages, bos_token=self._text("bos_token"), eos_token=self._text("eos_token"))
        if not text:
            raise FastKVError(f"{self._chat.path}: the chat template writes nothing for these messages")
        ids = ChatIds(self._encode(text))
        after = written_after(text, messages)
        ids.tail = len(self._encode(after)) if after else 0
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            return self._vocabulary.encode(text)
        except Exception as error:  # each library has its own, and the tokenizers library bare ones
            raise FastKVError(f"{self._vocabulary.path}: cannot encode this text ({error})") from None

    def _text(self, key: str) -> str:
        token = _content(self._fields, key)
        if token is not None:
            return token
        token_id = self.bos_id if key == "bos_token" else self._eos_id
        return "" if token_id is None else self._vocabulary.token_of(token_id) or ""

    def _special(self, key: str, default: int | None = None) -> int | None:
        token = _content(self._fields, key)
        if token is None:
            return default
        token_id = self._vocabulary.id_of(token)
        return default if token_id is None else token_id

    def _end(self, rule: str, template: bool, name: str, token_id: int | None) -> list[int]:
        if not self._fields.flag(rule, template):
            return []
        if token_id is None:
            raise FastKVError(f"{self._fields.source}: {rule} is true, but no {name} is stated")
        return [token_id]


def _content(fields: Fields, key: str) -> str | None:
    """A special token's text: given as a string, or as an object with `content`."""
    value: Any = fields.get(key, None)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise fields.complain(key, "a string")
    return value
