"""A request, checked before anything runs: its ids are known to the model, and prompt and answer fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkv.cache.policy import Policy
from fastkv.cache.snapshot import Snapshot
from fastkv.engine.beginning import Beginning
from fastkv.engine.footprint import Footprint
from fastkv.engine.memory import check_fits
from fastkv.engine.plan import RequestPlan
from fastkv.engine.sampler import SamplingParams
from fastkv.engine.speculation.figures import Speculation
from fastkv.engine.turn import Turn
from fastkv.errors import FastKVError, brief
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama

DEFAULT_MAX_TOKENS = 256
_SHOWN = 60  # characters of what is no prompt
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)

# Tokens of the prompt, and of the answer at most; whether they are drawn at random; entries that are there already
Sizes = tuple[int, int, bool, tuple[int, ...]]


@dataclass(frozen=True)
class Request:
    """A checked request: prompt and answer fit the model, as `plan` says. `eos_ids` is empty if ignored.

    ids: int64 [1, N], the prompt, on the host: of a turn what has no entries yet. turn: of a session. beginning: what
    the prompt shares with others of its list, which is then not in `ids`; reads_beginning: whether it comes first of
    them. speculation: how tokens are drafted (None: not at all). draft_plan: of the entries that drafts are made from,
    where the model itself drafts; `plan` then keeps everything.
    """

    ids: Tensor
    params: SamplingParams
    plan: RequestPlan
    eos_ids: frozenset[int]
    turn: Turn | None = None
    beginning: Beginning | None = None
    reads_beginning: bool = False
    speculation: Speculation | None = None
    draft_plan: RequestPlan | None = None

    @property
    def policy(self) -> Policy:
        """Whose choices the answer depends on (of a turn the session's), or the draft's."""
        if self.draft_plan is not None:
            return self.draft_plan.policy
        if self.beginning is not None:
            return self.beginning.plan.policy
        return self.plan.policy if self.turn is None else self.turn.policy

    @property
    def past(self) -> Snapshot | None:
        """What it continues from."""
        if self.beginning is not None:
            return self.beginning.snapshot
        return None if self.turn is None else self.turn.held.snapshot

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt, with those of a beginning that it shares."""
        return self.plan.n_tokens + (0 if self.beginning is None else self.plan.start)

    @property
    def n_reused(self) -> int:
        """Tokens whose entries are there before it runs."""
        if self.turn is not None:
            return self.turn.held.fed
        return 0 if self.reads_beginning else self.plan.start

    @property
    def all_ids(self) -> Tensor:
        """int64 [1, P + N]: what the sequence has before the answer, on the host."""
        if self.beginning is not None:
            return torch.cat((self.beginning.ids, self.ids), dim=1)
        if self.turn is None or not self.turn.held.fed:
            return self.ids
        return torch.cat((torch.tensor([self.turn.held.ids[: self.turn.held.fed]]), self.ids), dim=1)

    @property
    def sizes(self) -> Sizes:
        """What decides, under one policy and model, how much memory it takes."""
        return self.plan.n_tokens, self.max_tokens, self.params.temperature > 0, self.plan.past

    @property
    def max_tokens(self) -> int:
        """Tokens of the answer at most."""
        return self.plan.max_tokens


def id_tensor(token_ids: Any, vocab_size: int) -> Tensor:
    """list[int], or an integer array or tensor [N] or [B, N] -> int64 [B, N], every id inside the vocabulary."""
    if isinstance(token_ids, str):
        raise FastKVError(
            f"prefill takes token ids, not text ({brief(token_ids, _SHOWN)}); LLM.tokenizer encodes it",
            setting="prompt",
        )
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise _no_prompt(token_ids) from None
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.numel() == 0:
        raise FastKVError("the prompt is empty", setting="prompt")
    if ids.dim() != 2 or ids.dtype not in _INTEGERS:
        raise _no_prompt(token_ids)
    return checked_ids(ids, vocab_size)


def step_tensor(token_ids: Any, batch: int, vocab_size: int) -> Tensor:
    """The tokens of a decode step: integers [B] or [B, T] -> int64 [B, T], every id inside the vocabulary."""
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0)
    ids = ids.unsqueeze(1) if ids.dim() == 1 else ids
    if ids.dim() == 2 and ids.shape[0] == batch and ids.shape[1] and ids.dtype in _INTEGERS:
        return checked_ids(ids, vocab_size)
    raise FastKVError(
        f"decode takes one token id or several for each of {batch} prompts, not {brief(token_ids, _SHOWN)}"
    )


def checked_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """As int64; FastKVError for an id outside the vocabulary."""
    ids = ids.to(torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise FastKVError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
    return ids


def answer_length(
    config: ModelConfig, params: SamplingParams, n_tokens: int, limit: int, n_before: int = 0, evicts: bool = False
) -> int:
    """The `max_tokens` that holds; FastKVError if an explicit one does not fit after the prompt.

    n_before: tokens of the sequence before the prompt. evicts: whether a decode budget is to drop entries.
    """
    room = limit - n_before - n_tokens
    after = f" after the {n_before} before them" if n_before else ""
    windowed = limit < config.context_length
    what = f"sliding_window of {limit}, where tokens are dropped" if windowed else f"context of {limit}"
    everything = "policy full without decode_budget" if evicts else "policy full"
    advice = f"use {everything}, or shorten it" if windowed else "shorten it"
    if room < 1:
        raise FastKVError(
            f"the prompt has {n_tokens} tokens{after} and fills the model's {what}; {advice}",
            setting="prompt",
        )
    if params.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if params.max_tokens > room:
        raise FastKVError(
            f"max_tokens must be at most {room}, not {params.max_tokens}: the prompt has {n_tokens} tokens{after}, "
            f"in the model's {what}" + (f"; use {everything} for more" if windowed else ""),
            setting="max_tokens",
        )
    return int(params.max_tokens)


def check_request_fits(
    model: Llama, plan: RequestPlan, needed: Footprint, reusable: int = 0, reusable_on_host: int = 0
) -> None:
    """FastKVError if a request needs more than the device's memory has left, at its worst moment, or the host's.

    reusable, reusable_on_host: bytes that are allocated but idle, which it can use.
    """
    parts = {
        "KV cache": needed.cache,
        _whose(plan): needed.held,
        "buffers for all layers": needed.buffers,
        "lists of positions": needed.lists,
        "scratch for one layer": needed.step,
    }
    advice = "lower kv_retention or max_tokens, or shorten the prompt"
    if plan.policy.over_layers and needed.held:
        advice = "take another policy, lower max_tokens, or shorten the prompt"
    elif needed.held and plan.shared:
        advice = "leave pairs out of share_layers, lower kv_retention or max_tokens, or shorten the prompt"
    elif needed.held:
        advice = "set lookahead to 0, lower kv_retention or max_tokens, or shorten the prompt"
    check_fits("the request", parts, model.device, advice, reusable, model.ranks)
    if needed.on_host:
        parts = {
            "hidden states, K and V of one layer on the host": sum(needed.host.values()),
            "scores there": needed.host_step,
        }
        check_fits("the request", parts, torch.device("cpu"), advice, reusable_on_host)


def _whose(plan: RequestPlan) -> str:
    """What K and V of all tokens are held for."""
    if plan.shared:
        return "whole K and V of layers that later ones read"
    if plan.policy.over_layers:
        return "whole K and V that this policy holds until the last layer"
    return "whole K and V that lookahead holds until its draft ends"


def is_batch(prompt: Any) -> bool:
    """Whether this is a list of prompts rather than one prompt, by its first element; looks no further."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)) or not prompt:
        return False
    return isinstance(prompt[0], (str, Sequence, Turn)) or getattr(prompt[0], "ndim", 0) > 0


def check_sessions(requests: Sequence[Request]) -> None:
    """FastKVError where a list has two turns of one session, which can only run one after another."""
    seen: dict[int, int] = {}
    for index, request in enumerate(requests):
        turn = request.turn
        if turn is not None and turn.keep and seen.setdefault(id(turn.owner), index) != index:
            first = seen[id(turn.owner)]
            raise FastKVError(
                f"prompt {index} of the list: prompt {first} is a turn of the same session; fork it, or ask again "
                "after this list",
                prompt=index,
            )


def params_of_each(params: Any, count: int) -> Sequence[Any]:
    """The SamplingParams (or None) of each of `count` prompts, from one for all or a list of them."""
    if not isinstance(params, Sequence):
        return [params] * count
    if len(params) != count:
        raise FastKVError(f"params must be one for all prompts or one for each: {len(params)} for {count} prompts")
    return params


def _no_prompt(value: Any) -> FastKVError:
    return FastKVError(f"a prompt is a string or a list of token ids, not {brief(value, _SHOWN)}", setting="prompt")
