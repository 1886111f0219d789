"""A request, checked before anything runs: its ids are known to the model, and prompt and answer fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy, drops_tokens, plan_layers
from fastkv.engine.memory import check_fits
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Request:
    """A checked request: the prompt fits the model, `max_tokens` fits behind it, `eos_ids` is empty if ignored."""

    prompt: list[int]
    params: SamplingParams
    policy: Policy
    max_tokens: int
    position_limit: int
    eos_ids: frozenset[int]


def id_tensor(token_ids: Any, vocab_size: int) -> Tensor:
    """list[int], or an integer array or tensor [N] or [B, N] -> int64 [B, N], every id inside the vocabulary."""
    wrong = FastKVError(f"a prompt is a string or a list of token ids, not {_brief(token_ids)}", setting="prompt")
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.numel() == 0:
        raise FastKVError("the prompt is empty", setting="prompt")
    if ids.dim() != 2 or not _is_integer(ids):
        raise wrong
    return checked_ids(ids, vocab_size)


def step_tensor(token_ids: Any, batch: int, vocab_size: int) -> Tensor:
    """The tokens of one decode step: integers [B] -> int64 [B], every id inside the vocabulary."""
    wrong = FastKVError(f"decode takes a token id for each of {batch} prompts, not {_brief(token_ids)}")
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None
    if ids.shape != (batch,) or not _is_integer(ids):
        raise wrong
    return checked_ids(ids, vocab_size)


def checked_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """As int64; FastKVError for an id outside the vocabulary."""
    ids = ids.to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise FastKVError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    return ids


def position_limit(config: ModelConfig, policy: Policy, n_tokens: int) -> int:
    """The positions that the text may take, in tokens; FastKVError if the prompt alone takes more.

    Where a policy drops tokens of a model with a sliding window, that window is the limit: which of the kept entries
    have left it is not tracked.
    """
    limit = config.context_length
    if n_tokens > limit:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens, but the model's context (max_position_embeddings) is {limit}; "
            "shorten it",
            setting="prompt",
        )
    window = config.sliding_window
    if window is None or not drops_tokens(policy, config.n_layers, n_tokens):
        return limit
    if n_tokens > window:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens, more than the model's sliding_window of {window}, where policy "
            f"{policy.name} cannot drop tokens; use policy full, or shorten it",
            setting="prompt",
        )
    return min(limit, window)


def answer_length(config: ModelConfig, params: SamplingParams, n_tokens: int, limit: int) -> int:
    """The `max_tokens` that holds; FastKVError if an explicit one does not fit behind the prompt."""
    room = limit - n_tokens
    windowed = limit < config.context_length
    what = f"sliding_window of {limit}, where tokens are dropped" if windowed else f"context of {limit}"
    advice = "use policy full, or shorten it" if windowed else "shorten it"
    if room < 1:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens and fills the model's {what}; {advice}",
            setting="prompt",
        )
    if params.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if params.max_tokens > room:
        raise FastKVError(
            f"max_tokens must be at most {room}, not {params.max_tokens}: the prompt has {n_tokens} tokens, in the "
            f"model's {what}" + ("; use policy full for more" if windowed else ""),
            setting="max_tokens",
        )
    return int(params.max_tokens)


def check_cache_fits(
    config: ModelConfig,
    policy: Policy,
    n_tokens: int,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    reusable: int = 0,
) -> None:
    """FastKVError if the KV cache of `batch` prompts is more than the device's memory has left.

    reusable: bytes that are taken, but by nobody who uses them.
    """
    kept = [plan.kept for plan in plan_layers(policy, config.n_layers, n_tokens)]
    values = KVCache.size_of(kept, max_tokens, config.n_kv_heads, config.head_dim)
    advice = "lower kv_retention or max_tokens, or shorten the prompt"
    check_fits("the KV cache", batch * values * dtype.itemsize, device, advice, reusable)


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one prompt."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and any(isinstance(one, (str, Sequence)) or getattr(one, "ndim", 0) > 0 for one in prompt)
    )


def params_of_each(params: Any, count: int) -> Sequence[Any]:
    """The SamplingParams (or None) of each of `count` prompts, from one for all or a list of them."""
    if not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise FastKVError(f"params must be one for all prompts or one for each: {len(params)} for {count} prompts")
    return params


def _is_integer(ids: Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
