"""The network as training sees it: initial weights, a forward over every position, the hiding of layer 0, the loss."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_data import ANSWER_WEIGHT, EOS, Batch

from fastkv.models.block import Attend
from fastkv.models.llama import Llama

NEAR = 7  # tokens that layer 0 always sees, the query's own included
UNHIDDEN_SHARE = 0.25  # of the examples
MAX_HIDDEN = 0.97


def initialise(model: Llama, seed: int) -> None:
    """Fill every weight from `seed`: norms with 1, matrices with normal numbers of deviation 1 / √columns.

    Those that write into the residual stream start smaller. The usual 0.02 for all is too little for a network this
    narrow: measured at three layers and 64 tokens, 5 % of the codes at most were right in 700 steps, against a third.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            continue
        std = parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * model.config.n_layers) ** 0.5
        nn.init.normal_(parameter, std=std, generator=generator)


def attend_with(mask: Tensor | None) -> Attend:
    """Attention of every query over the whole text: causal, or by `mask`, bool [B, 1, T, T], True where seen."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Repeated by hand: the CPU's fast kernel, and its backward, want as many KV heads as query heads.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    return attend


def hide(rng: random.Random, size: int, length: int) -> Tensor:
    """Draw the tokens that layer 0 does not see from afar: bool [B, T].

    Each example draws its own probability: 0 for a quarter of them, else up to 0.97 and often high. The first token
    is never hidden: attention needs a place to rest.
    """
    shares = [
        0.0 if rng.random() < UNHIDDEN_SHARE else MAX_HIDDEN * max(rng.random(), rng.random()) for _ in range(size)
    ]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    hidden = torch.rand(size, length, generator=generator) < torch.tensor(shares)[:, None]
    hidden[:, 0] = False
    return hidden


def layer_0_mask(hidden: Tensor) -> Tensor:
    """hidden, bool [B, T] -> what each query sees, bool [B, 1, T, T]: what comes before it, but for the far hidden."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    distance = positions[:, None] - positions  # [T, T]
    return ((distance >= 0) & ((distance < NEAR) | ~hidden[:, None, None, :])).contiguous()


def forward(model: Llama, ids: Tensor, hidden_tokens: Tensor | None = None) -> Tensor:
    """ids int64 [B, T] -> logits float32 [B, T, V]. `hidden_tokens`, bool [B, T], are far from sight in layer 0."""
    rope = model.rope_of_range(0, ids.shape[1])
    everything = attend_with(None)
    first = everything if hidden_tokens is None else attend_with(layer_0_mask(hidden_tokens))
    hidden = model.embed(ids)
    for index, block in enumerate(model.blocks):
        hidden = block.attention(hidden, rope, everything if index else first)
        hidden = block.mlp(hidden)
    return model.lm_head(model.norm(hidden))


def loss_of(model: Llama, batch: Batch, hidden_tokens: Tensor | None = None) -> Tensor:
    """The weighted mean cross-entropy of a batch."""
    logits = forward(model, batch.ids[:, :-1], hidden_tokens)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def count_right(model: Llama, batch: Batch) -> tuple[int, int]:
    """Answers that greedy decoding gets whole (the code, full stop and newline), and all answers.

    One forward tells: the greedy answer is the right one exactly if each of its tokens is the likeliest after the ones
    before it.
    """
    likeliest = forward(model, batch.ids[:, :-1]).argmax(dim=-1)  # [B, T]
    answers = batch.weights[:, 1:] == ANSWER_WEIGHT
    wanted = batch.ids[:, 1:][answers]  # all answers, one after another; each ends in EOS
    ends = wanted == EOS
    wrong = (likeliest[answers] != wanted) & ~ends
    answer = ends.cumsum(0) - ends.int()  # which one a token is of
    asked = int(ends.sum())
    return asked - len(answer[wrong].unique()), asked
