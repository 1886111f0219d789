"""Text <-> token ids through one small interface: `tokenizer.json` (tokenizers) or `tokenizer.model` (sentencepiece).

Knows the BOS and EOS rules that a model folder states. Knows nothing of streaming or chat (detokenizer.py, chat.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fastkv.errors import FastKVError, FaultError
from fastkv.models.config import ModelConfig
from fastkv.models.fields import Fields
from fastkv.models.text.chat import Chat, ChatIds
from fastkv.models.text.native import LibraryError
from fastkv.models.text.special_tokens import SpecialTokens

_log = logging.getLogger(__name__)
_SHORT = 2**16  # characters that are encoded without a thought


class Vocabulary(Protocol):
    """What the two libraries have in common. Special tokens in a text are recognised, none are added."""

    path: Path

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str:
        """Special tokens, and ids outside the vocabulary, decode to nothing."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def special_id(self, token: str) -> int | None:
        """The id of a token that decodes to nothing; None where there is none of this text."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether a token is no part of any text."""
        ...

    def bytes_of(self, token_id: int) -> bytes | None:
        """As a Decoder's (detokenizer.py)."""
        ...

    def frame(self, bos: int | None) -> tuple[list[int], list[int]]:
        """What the tokenizer's own file puts before and after a text."""
        ...

    def default(self, name: str) -> str | None:
        """The token under a name such as `bos_token` where no file beside the vocabulary says it."""
        ...


class Tokenizer:
    """A model's tokenizer. `bos_id` and `eos_ids` come from the tokenizer's and the model's own files."""

    def __init__(self, vocabulary: Vocabulary, tokens: SpecialTokens, config: ModelConfig, chat: Chat) -> None:
        self._vocabulary = vocabulary
        self._chat = chat
        self._named = {"bos_token": vocabulary.default("bos_token"), "eos_token": vocabulary.default("eos_token")}
        self._named.update({"unk_token": vocabulary.default("unk_token")} | tokens.named)
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids = frozenset([*config.eos_token_ids, *([] if eos is None else [eos])])
        self._prefix, self._suffix = self._frame(tokens.config, eos)
        self._told = False  # of a second BOS: of many prompts the first one says it for all

    @classmethod
    def from_pretrained(cls, folder: Path, config: ModelConfig) -> Tokenizer | None:
        """The tokenizer of a model folder, or None where it has none.

        `tokenizer.json` wins over `tokenizer.model`; a broken one raises FastKVError and is never passed over.
        """
        tokens = SpecialTokens.read(folder)
        # lexists: a folder or a link that leads nowhere is broken too, and no reason to take the other file
        if os.path.lexists(folder / "tokenizer.json"):
            from fastkv.models.text.tokenizer_json import JsonVocabulary

            vocabulary: Vocabulary = JsonVocabulary(folder / "tokenizer.json", tokens)
        elif os.path.lexists(folder / "tokenizer.model"):
            from fastkv.models.text.tokenizer_sentencepiece import SentencePieceVocabulary

            vocabulary = SentencePieceVocabulary(folder / "tokenizer.model", tokens)
        else:
            return None
        return cls(vocabulary, tokens, config, Chat.of(folder, tokens.config))

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Token ids of a prompt, with BOS and EOS where the model's files ask for them.

        limit: tokens that can be used. FastKVError, before all of the text is encoded, where it has far more.
        """
        ids = self._encode(text, limit)
        if self._prefix and ids[: len(self._prefix)] == self._prefix and not self._told:
            self._told = True
            _log.warning("the prompt begins with a BOS token, and gets another one: leave it out of the prompt")
        return [*self._prefix, *ids, *self._suffix]

    def encode_within(self, text: str) -> list[int]:
        """Token ids of a text that stands within a sequence: no BOS and no EOS."""
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and unknown ids give nothing."""
        try:
            return self._vocabulary.decode(ids)
        except LibraryError as error:
            raise FaultError(f"{self._vocabulary.path}: cannot decode these tokens ({error})") from None

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of a token that may hold a part of a character; b"" of one that holds whole ones only, None of one
        that says nothing.
        """
        return self._vocabulary.bytes_of(token_id)

    def id_of(self, token: str) -> int | None:
        """The id of a token, given as it is written; None where the vocabulary does not have it."""
        return self._vocabulary.id_of(token)

    def special_id(self, token: str) -> int | None:
        """The id of a special token, which is no part of a text; None where there is none written like this."""
        return self._vocabulary.special_id(token)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._chat.exists

    def encode_chat(
        self, messages: list[dict[str, str]], arguments: dict[str, Any] | None = None, limit: int | None = None
    ) -> ChatIds:
        """Token ids of a conversation ready for the model's answer, by the model's own chat template.

        messages: dicts with `role` and `content`. arguments: variables of the template, beyond the usual ones. The
        template writes every special token itself, so none is added. limit: as for `encode`.
        Raises FastKVError where the model has no template, or where the template refuses the messages.
        """
        named = {name: token for name, token in self._named.items() if token is not None}
        turn = self._chat.render(messages, named, arguments or {})
        ids = ChatIds(self._encode(turn.text, limit))
        ids.tail = len(self._encode(turn.after)) if turn.after else 0
        ids.ends = self._ends_of_turn(named, arguments or {})
        return ids

    def _ends_of_turn(self, named: dict[str, str], arguments: dict[str, Any]) -> frozenset[int]:
        """The special token that the template writes after an answer, if it writes one."""
        after = self._chat.after_answer(named, arguments)
        first = self._encode(after.lstrip())[:1] if after else []
        special = [i for i in first if self._vocabulary.is_special(i)]
        return frozenset(special)

    def _encode(self, text: str, limit: int | None = None) -> list[int]:
        if limit is not None:
            self._refuse_far_too_long(text, limit)
        return self._guarded(self._vocabulary.encode, text)

    def _refuse_far_too_long(self, text: str, limit: int) -> None:
        """FastKVError where the beginning of a text alone has more than twice the tokens that can be used.

        To encode all of it would take minutes and gigabytes. What follows cannot bring the number down to half.
        """
        count = max(_SHORT, 16 * limit)
        while 2 * count < len(text):
            if len(self._encode(text[:count])) > 2 * limit:
                raise FastKVError(
                    f"the prompt has {len(text):,} characters, of which the first {count:,} alone are more tokens than "
                    f"the model's context (max_position_embeddings) of {limit:,}; shorten it",
                    setting="prompt",
                )
            count *= 4

    def _id_of(self, name: str) -> int | None:
        token = self._named.get(name)
        return None if token is None else self._vocabulary.id_of(token)

    def _frame(self, config: Fields, eos: int | None) -> tuple[list[int], list[int]]:
        """What is put before and after a text: by the tokenizer's own file, unless tokenizer_config.json has a rule."""

        def ruled(rule: str, token_id: int | None) -> list[int]:
            return [token_id] if config.flag(rule, False) and token_id is not None else []

        has_bos, has_eos = "add_bos_token" in config, "add_eos_token" in config
        before, after = ([], []) if has_bos and has_eos else self._guarded(self._vocabulary.frame, self.bos_id)
        bos_rule, eos_rule = ruled("add_bos_token", self.bos_id), ruled("add_eos_token", eos)
        return (bos_rule if has_bos else before), (eos_rule if has_eos else after)

    def _guarded(self, call: Callable[[Any], Any], argument: Any) -> Any:
        """What the vocabulary's library gives; FastKVError, naming its file, for whatever it raises."""
        try:
            return call(argument)
        except Exception as error:  # each library has its own, and the tokenizers library bare ones
            raise FastKVError(f"{self._vocabulary.path}: cannot encode this text ({error})") from None
