"""Sampling: one call chooses the next token of every sequence in a decode batch, each by its own SamplingParams.

Knows nothing of text; stop strings are stopping.py's, what is done to logits is logits_filters.py's.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastkv.engine.counter_rng import stream_of, uniform
from fastkv.engine.logits_filters import apply_temperature, draw, keep_min_p, keep_top, penalise_repetition
from fastkv.errors import FastKVError, FaultError, brief, check_integer, check_number, check_switch

MAX_SEED = 2**63 - 1
NOT_FINITE = -1  # in place of a token: the sequence's logits hold NaN, or their maximum is infinite

_TOP_P_OFF = 2.0  # no sum of probabilities reaches it, however it is rounded
_TEMPERATURES = (1e-30, 1e30)  # what float32 divides by; beyond them nothing changes any more


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_tokens: tokens to generate at most; None means min(256, room left in the context).
    temperature: 0 is greedy, and then top_k, top_p, min_p and seed have nothing to decide.
    top_k: 0 is off. top_p: in (0, 1] (arXiv 1904.09751). min_p: in [0, 1], relative to the most probable token
    (arXiv 2407.01082).
    repetition_penalty: 1e-6 to 1e6, 1 is off; applies to every token of the prompt and every one generated so far
    (arXiv 1909.05858).
    seed: the same seed gives the same tokens, alone or in any batch; None draws a new one.
    stop: strings that end the text and are not part of it; one that is a special token of the model ends it, too.
    stop_token_ids: ids that end the text, as an EOS token does. ignore_eos: continue after an EOS token.

    Raises FastKVError for a value out of range.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        check_number("temperature", self.temperature, 0, math.inf)
        check_integer("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, 0, 1, above=True)
        check_number("min_p", self.min_p, 0, 1)
        check_number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_SEED)
        check_switch("ignore_eos", self.ignore_eos)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise FastKVError(f"stop must be strings that are not empty, not {brief(self.stop)}", setting="stop")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.stop_token_ids, Sequence) or isinstance(self.stop_token_ids, (str, bytes)):
            raise FastKVError(f"stop_token_ids must be a list of token ids, not {brief(self.stop_token_ids)}")
        for token_id in self.stop_token_ids:
            check_integer("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop_token_ids", tuple(map(int, self.stop_token_ids)))


class Features(NamedTuple):
    """Which parts of the work some sequence needs. Fixed when a graph is captured: graphs are kept by (n, features)."""

    draw: bool = False  # any at a temperature above 0; else all are greedy
    repetition_penalty: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    @classmethod
    def of(cls, params: SamplingParams) -> Features:
        """What one sequence needs; at temperature 0 there is nothing to draw, and nothing to filter for it."""
        penalty, hot = params.repetition_penalty != 1, params.temperature > 0
        return cls(hot, penalty, hot and params.top_k > 0, hot and params.top_p < 1, hot and params.min_p > 0)


class Sampler:
    """Chooses the next token of each sequence of a decode batch. A sequence has a slot, from `start` to `stop`.

    The filters run in the order repetition penalty, temperature, top-k, top-p, min-p, each on what the one before left.
    A sequence's tokens depend on its settings, seed, prompt and logits alone, never on its slot or on what else is in
    the batch (see logits_filters.draw for what a GPU's rounding may do).

    Settings and state of all slots are tensors on the device, whose addresses stay: `sample` can be captured in one
    CUDA graph for slots 0 … n-1, and no method waits for the device. Only the table of seen tokens, bool
    [n_slots, V], is made by the first sequence with a repetition penalty; `features` has changed by then.
    """

    def __init__(self, n_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (n_slots, vocab_size)
        self._device = device
        self._stream = torch.zeros(n_slots, dtype=torch.int64, device=device)  # where the seed's numbers begin
        self._step = torch.zeros(n_slots, dtype=torch.int64, device=device)  # tokens drawn so far
        self._temperature = torch.zeros(n_slots, device=device)
        self._penalty = torch.ones(n_slots, device=device)
        self._top_k = torch.full((n_slots,), vocab_size, dtype=torch.int64, device=device)
        self._top_p = torch.full((n_slots,), _TOP_P_OFF, dtype=torch.float64, device=device)
        self._log_min_p = torch.full((n_slots,), -math.inf, device=device)
        self._seen: Tensor | None = None
        self._slots = torch.arange(n_slots, device=device)
        self._needs: dict[int, Features] = {}
        self._features = Features()

    @property
    def features(self) -> Features:
        """What the sequences that have a slot now need together."""
        return self._features

    @torch.inference_mode()
    def start(self, slot: int, params: SamplingParams, prompt: Tensor) -> None:
        """Begin a sequence in this slot. prompt: int64 [1, N] or [N], what the repetition penalty has seen at first."""
        needs = Features.of(params)
        self._set(slot, params, needs)
        self._step[slot].zero_()
        if needs.draw:
            seed = secrets.randbits(63) if params.seed is None else int(params.seed)
            self._stream[slot].fill_(seed)
            self._stream[slot].copy_(stream_of(self._stream[slot]))
        if needs.repetition_penalty:
            if self._seen is None:
                self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._seen[slot].zero_().scatter_(0, prompt.reshape(-1), True)
        self._note(slot, needs)

    @torch.inference_mode()
    def stop(self, slot: int) -> None:
        """The slot is free: greedy, at no cost to the others."""
        params = SamplingParams()
        self._set(slot, params, Features.of(params))
        self._note(slot, None)

    @torch.inference_mode()
    def follow(self, slot: int, other: Sampler) -> None:
        """Draw next in this slot what `other` would draw next in its slot of that number, from the same logits.

        Both were started with the same settings and prompt.
        """
        for mine, its in ((self._stream, other._stream), (self._step, other._step)):
            mine[slot].copy_(its[slot])
        if self._seen is not None and other._seen is not None:
            self._seen[slot].copy_(other._seen[slot])

    def _set(self, slot: int, params: SamplingParams, needs: Features) -> None:
        """Write the settings where the device reads them, in place; a filter that is not needed is off."""
        vocab_size, (coldest, hottest) = self._shape[1], _TEMPERATURES
        temperature = min(max(float(params.temperature), coldest), hottest)
        self._temperature[slot].fill_(temperature if needs.draw else 0.0)
        self._penalty[slot].fill_(float(params.repetition_penalty))
        self._top_k[slot].fill_(min(int(params.top_k), vocab_size) if needs.top_k else vocab_size)
        self._top_p[slot].fill_(float(params.top_p) if needs.top_p else _TOP_P_OFF)
        self._log_min_p[slot].fill_(math.log(params.min_p) if needs.min_p else -math.inf)

    def _note(self, slot: int, needs: Features | None) -> None:
        self._needs.pop(slot, None)
        if needs is not None:
            self._needs[slot] = needs
        self._features = Features(*map(any, zip(*self._needs.values(), strict=True)))

    @torch.inference_mode()
    def sample(self, logits: Tensor, active: Tensor, features: Features | None = None) -> Tensor:
        """The next token of slots 0 … n-1: logits float32 [n, V] -> int64 [n].

        active: bool or int64 [n], the slots whose state advances; the tokens of the others mean nothing.
        features: at least what the active slots need; None is `self.features`.
        NOT_FINITE stands for a token that the logits cannot decide. It is no token id: where tokens are embedded before
        the host has read them, clamp them to 0 first.
        """
        n = len(logits)
        features = self._features if features is None else features
        return self._sample(logits, slice(n), self._slots[:n], active.to(torch.int64), features)

    @torch.inference_mode()
    def sample_slots(self, logits: Tensor, slots: Tensor) -> Tensor:
        """As `sample`, for these slots, int64 [B], no two of them equal: logits float32 [B, V] -> int64 [B]."""
        return self._sample(logits, slots, slots, torch.ones_like(slots), self._features)

    def _sample(
        self, logits: Tensor, where: slice | Tensor, slots: Tensor, advance: Tensor, features: Features
    ) -> Tensor:
        """where: the slots as an index, a slice if they are a prefix (views, no copies). advance: 1 or 0, int64 [B]."""
        if features.repetition_penalty:
            assert self._seen is not None, "features of sequences that have not started"
            logits = penalise_repetition(logits, self._seen[where], self._penalty[where])
        best, tokens = logits.max(dim=-1)  # NaN if there is one; of equal tokens the first
        if features.draw:
            drawn = self._draw(logits, best, where, features)
            tokens = torch.where(self._temperature[where] > 0, drawn, tokens)
            self._step.index_add_(0, slots, advance)
        tokens = tokens.masked_fill((best - best).ne(0), NOT_FINITE)  # infinity - infinity is NaN
        if features.repetition_penalty:
            self._remember(tokens, slots, advance)
        return tokens

    def _draw(self, logits: Tensor, best: Tensor, where: slice | Tensor, features: Features) -> Tensor:
        logits = apply_temperature(logits, best, self._temperature[where])
        if features.top_k or features.top_p:
            top_k = self._top_k[where] if features.top_k else None
            logits = keep_top(logits, top_k, self._top_p[where] if features.top_p else None)
        if features.min_p:
            logits = keep_min_p(logits, self._log_min_p[where])
        return draw(logits, uniform(self._stream[where], self._step[where]))

    def _remember(self, tokens: Tensor, slots: Tensor, advance: Tensor) -> None:
        """Mark the tokens of the slots that advance as seen."""
        assert self._seen is not None
        place = (slots, tokens.clamp_min(0))
        self._seen.index_put_(place, self._seen[place] | ((advance > 0) & (tokens >= 0)))


def not_finite_error(dtype: torch.dtype) -> FaultError:
    """What to raise for NOT_FINITE, `dtype` being the model's."""
    name = str(dtype).removeprefix("torch.")
    ways_out = {
        "float16": "its largest number is 65504, which this model exceeds; try bfloat16 or float32",
        "bfloat16": "try float32; if that does not help, the weights are damaged: get the checkpoint anew",
    }
    way_out = ways_out.get(name, "the weights hold such numbers or are damaged: get the checkpoint anew")
    return FaultError(f"the model's logits are NaN or infinite in {name}: {way_out}", setting="dtype")
