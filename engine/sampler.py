"""Sampling: SamplingParams -> a callable on logits. Knows nothing of text; stop strings are stopping.py's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkv.errors import FastKVError, check_integer, check_number

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    max_tokens: tokens to generate at most; None means min(256, room left in the context).
    temperature: 0 is greedy, and then top_k, top_p, min_p and seed have nothing to decide.
    top_k: 0 is off. top_p: in (0, 1] (arXiv 1904.09751). min_p: in [0, 1], relative to the most probable token
    (arXiv 2407.01082).
    repetition_penalty: 1e-6 to 1e6, 1 is off; applies to every token of the prompt and of the text so far
    (arXiv 1909.05858).
    seed: the same seed gives the same text; None draws a new one.
    stop: strings that end the text and are not part of it. ignore_eos: go on behind an EOS token.

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
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise FastKVError(f"stop must be strings that are not empty, not {self.stop!r}", setting="stop")
        object.__setattr__(self, "stop", tuple(stop))


class Sampler:
    """Chooses one token a call, for B prompts that share their SamplingParams; `start` comes first.

    Works on the logits' device without waiting for it, in memory that stays where it is. The filters run in the order
    repetition penalty, temperature, top-k, top-p, min-p, each on what the one before left.
    """

    def __init__(self, params: SamplingParams, batch: int, vocab_size: int, device: torch.device) -> None:
        self.params = params
        self.generator = torch.Generator(device)
        self._seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(batch, vocab_size, dtype=torch.bool, device=device)

    @torch.inference_mode()
    def start(self, prompt: Tensor, seed: int | None) -> None:
        """Begin a text behind `prompt`, int64 [B, N]: its tokens are seen, and chance begins at `seed` (None: any)."""
        if self._seen is not None:
            self._seen.zero_().scatter_(1, prompt, True)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """logits float32 [B, V] -> token ids int64 [B]."""
        params = self.params
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen, params.repetition_penalty)
        tokens = logits.argmax(dim=-1) if params.temperature == 0 else self._draw(warm(logits, params.temperature))
        if self._seen is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def _draw(self, logits: Tensor) -> Tensor:
        params = self.params
        if params.top_k:
            logits = keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        return draw(logits, self.generator)


def warm(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature; finite for the best token even next to zero, where it is all but greedy."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen`, bool [B, V], less likely: positive logits are divided, others multiplied."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k highest of each row (equal ones at the border stay)."""
    border = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < border, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest tokens of each row that together have a probability of at least p."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the tokens ahead of each
    beyond = before >= p
    beyond[..., 0] = False  # the best stays, even where p is next to nothing
    dropped = torch.zeros_like(beyond).scatter(-1, order, beyond)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens with less than p times the probability of the row's most probable one."""
    border = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < border, -math.inf)


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token for each row, in proportion to softmax(logits). [B, V] -> [B].

    The token with the smallest of V exponential waiting times, its probability being the rate: a draw that needs no
    look at the device from the host, as torch.multinomial does.
    """
    waiting = torch.empty_like(logits).exponential_(generator=generator).clamp_min_(torch.finfo(logits.dtype).tiny)
    return (logits.softmax(dim=-1) / waiting).argmax(dim=-1)
