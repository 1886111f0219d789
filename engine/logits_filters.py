"""What sampling does to logits, as plain functions over a batch: logits [B, V] and, for each sequence, a setting [B].

Each sequence is treated on its own, and a setting that is off (see each function) leaves its logits as they are, bit
for bit. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the tokens marked in `seen`, bool [B, V], less likely: positive logits are divided, others multiplied.

    penalty float32 [B]; 1 is off.
    """
    penalty = penalty.unsqueeze(1)
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def apply_temperature(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature, float32 [B], after subtracting the highest logit `best`, float32 [B].

    The best token has 0 then, whatever the temperature: next to zero the rest is -inf, which is all but greedy.
    """
    return (logits - best.unsqueeze(1)) / temperature.clamp_min(1e-30).unsqueeze(1)


def keep_top(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """-inf for all but the k highest, and of these for all but the fewest that together have a probability of p.

    k: int64 [B] in 1 … V (V is off); equal logits at the border stay. p: float64 [B] above 0 (2 is off); of equal ones
    at the border the lower ids stay, and the best token always does. None: off for all. One sort serves both.
    """
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if k is not None:
        border = ordered.gather(-1, k.unsqueeze(1) - 1)
        logits = logits.masked_fill(logits < border, -math.inf)
        ordered = ordered.masked_fill(ordered < border, -math.inf)
    if p is None:
        return logits
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities  # of the better tokens: 0 for the best
    beyond = before >= p.unsqueeze(1)
    return logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -math.inf)


def keep_min_p(logits: Tensor, log_p: Tensor) -> Tensor:
    """-inf for tokens with less than p times the probability of the sequence's most probable one, whose logit is 0.

    log_p: log of p, float32 [B]; -inf is off.
    """
    return logits.masked_fill(logits < log_p.unsqueeze(1), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token for each sequence in proportion to softmax(logits): [B, V] and float64 [B] in [0, 1) -> int64 [B].

    By the inverse of the distribution function: the first token, in the order of ids, at which the sum of probabilities
    exceeds `uniform` times their total. Sums are float64. The total is the largest sum at a possible token, so one
    always exceeds; sums at impossible tokens count as 0, so those never do, however a GPU rounds its sums.

    On a CPU each sequence is added up on its own from its first token: the result is the same bits in any batch. A GPU
    may add in another order for another batch size; then the token can differ only where `uniform` is within rounding
    of a border between two tokens, about 1e-16 of it: at 100,000 tokens, one draw in 10**10 or fewer.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float64)
    sums = probabilities.cumsum(dim=-1).masked_fill(probabilities == 0, 0.0)
    exceeds = sums > uniform.unsqueeze(1) * sums.amax(dim=-1, keepdim=True)
    return exceeds.view(torch.uint8).argmax(dim=-1)  # the first of equal ones
