"""What --chat-arg and --stop-token say, in the model's terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastkv.errors import FastKVError, brief

if TYPE_CHECKING:
    from fastkv.engine.llm import LLM


def chat_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, each once -> variables of a chat template. A value that is JSON is what it says, others are texts."""
    arguments: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier() or key in arguments:
            raise FastKVError(f"is KEY=VALUE, each key once, not {brief(text)}", setting="chat_arg")
        arguments[key] = _value(value)
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def stop_token_ids(llm: LLM, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens that are given as ids or as they are written. FastKVError for what is no token of the model."""
    return tuple(_token_id(llm, token) for token in tokens)


def _token_id(llm: LLM, token: str) -> int:
    size = llm.config.vocab_size
    if token.isascii() and token.isdecimal():
        token_id = int(token) if len(token) < 20 else size
    else:
        found = None if llm.tokenizer is None else llm.tokenizer.id_of(token)
        if found is None:
            raise FastKVError(
                f"{brief(token)} is no token of this model; --stop ends an answer before any text", setting="stop_token"
            )
        token_id = found
    if token_id >= size:
        raise FastKVError(f"token {brief(token)} is outside the model's vocabulary of {size}", setting="stop_token")
    return token_id
