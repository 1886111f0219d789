"""One decoder layer: the projections around attention, the MLP, and the steps in which the engine takes them.

Attention itself is handed in or done between two steps, so that the engine can stand between projections and output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkv.models.layers import MLP, RMSNorm, Rope
from fastkv.models.linear import Stacked, Summed
from fastkv.models.network_config import NetworkConfig

# (q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, D]), q and k rotated -> [B, Hq, T, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention without the attention: projections, norms of q and k, rotation.

    q, k and v are one matrix: rows [q; k; v].

    q_norm and k_norm: [B, H, T, D] -> the same, before the rotation, or None for both. scale: what scores are
    multiplied by; attention itself applies 1 / sqrt(head_dim), which None stands for, and q carries the ratio to any
    other. rotary: which of the model's rotary embeddings (Family.rotary_embeddings) turns this layer.
    """

    def __init__(
        self,
        config: NetworkConfig,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
        rotary: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.rotary = rotary
        self.qkv_proj = Stacked(config.hidden_size, [n * self.head_dim for n in self.heads], bias=config.qkv_bias)
        self.o_proj = Summed(config.n_heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.has_norms = q_norm is not None
        ratio = 1.0 if scale is None else scale * math.sqrt(self.head_dim)
        self.q_factor = None if math.isclose(ratio, 1.0) else ratio
        self._gram: tuple[tuple[int, int], Tensor] | None = None  # of which weights, and what `output_gram` gives

    def project(self, hidden: Tensor, rope: Rope, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, E] -> q [B, Hq, T, D], k and v [B, Hkv, T, D], q and k rotated.

        They are views of `out`, [B, Hq + 2 Hkv, T, D], if there is one.
        """
        n_q, n_k, n_v = self.heads
        rotation = rope.rotations[self.rotary]
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        turning, v = heads.split((n_q + n_k, n_v), dim=1)
        if self.has_norms:
            turning = torch.cat((self.q_norm(turning[:, :n_q]), self.k_norm(turning[:, n_q:])), dim=1)
        turned = rotation.rotate(turning, None if out is None else out[:, : n_q + n_k])
        if self.q_factor is not None:
            turned[:, :n_q].mul_(self.q_factor)
        if out is not None:
            out[:, n_q + n_k :] = v
        q, k = turned.split((n_q, n_k), dim=1)
        return q, k, v if out is None else out[:, n_q + n_k :]

    def project_q(self, hidden: Tensor, rope: Rope) -> Tensor:
        """hidden [B, T, E] -> q [B, Hq, T, D] alone, rotated."""
        q = self.qkv_proj.part(hidden, 0, 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q = rope.rotations[self.rotary].rotate(self.q_norm(q))
        return q if self.q_factor is None else q.mul_(self.q_factor)

    def project_kv(self, hidden: Tensor, rope: Rope, out: Tensor) -> None:
        """hidden [B, T, E] -> k, rotated, and v into `out` [B, 2 Hkv, T, D]."""
        n_k = self.heads[1]
        heads = self.qkv_proj.part(hidden, 1, 3).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        rope.rotations[self.rotary].rotate(self.k_norm(heads[:, :n_k]), out=out[:, :n_k])
        out[:, n_k:] = heads[:, n_k:]

    def output_gram(self) -> Tensor:
        """W_h^T W_h of each query head's part W_h [E, D] of the output projection: float32 [Hq, D, D].

        |W_h x|^2 = x^T gram x, at D / E of the work. Made when first asked for and kept, until the weights change.
        """
        weight = self.o_proj.weight
        which = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._gram is None or self._gram[0] != which:
            heads = self.o_proj.dense().detach().float().unflatten(1, (-1, self.head_dim)).transpose(0, 1)  # [Hq, E, D]
            self._gram = which, heads.transpose(1, 2) @ heads
        return self._gram[1]


class Block(nn.Module):
    """One decoder layer, whole (`attention`, then `mlp`) or in the steps that a prefill takes (`project…`, `finish_`).

    Both ways add to the residual stream what three small methods say: `attention_input`, `attention_output` and
    `mlp_output`. These are what a family overrides, to put norms or factors around attention and MLP; here are none.
    """

    def __init__(self, attention: Attention, feed_forward: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.feed_forward = feed_forward

    def attention_input(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, E] -> what q, k and v are projected from, [B, T, E]. Leaves `hidden` as it is."""
        return hidden

    def attention_output(self, attended: Tensor) -> Tensor:
        """attended [B, Hq, T, D] -> what attention adds to the hidden states, [B, T, E]."""
        return self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))

    def mlp_output(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, E] -> what the MLP adds to it, [B, T, E]. Leaves `hidden` as it is."""
        return self.feed_forward(hidden)

    def attention(self, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """hidden [B, T, E] -> [B, T, E]; `attend` sees this layer's rotated q and k, and v."""
        return hidden + self.attention_output(attend(*self.project(hidden, rope)))

    def mlp(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, E] -> [B, T, E]."""
        return hidden + self.mlp_output(hidden)

    def project(self, hidden: Tensor, rope: Rope, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, E] -> q [B, Hq, T, D], k and v [B, Hkv, T, D], q and k rotated; views of `out` if given."""
        return self.self_attn.project(self.attention_input(hidden), rope, out)

    def project_q(self, hidden: Tensor, rope: Rope) -> Tensor:
        """The q of `project` alone."""
        return self.self_attn.project_q(self.attention_input(hidden), rope)

    def project_kv(self, hidden: Tensor, rope: Rope, out: Tensor) -> None:
        """The k and v of `project` alone, into `out` [B, 2 Hkv, T, D]."""
        self.self_attn.project_kv(self.attention_input(hidden), rope, out)

    def finish_(self, hidden: Tensor, attended: Tensor) -> None:
        """What follows attention, written into hidden [B, T, E]; attended: [B, Hq, T, D]."""
        hidden += self.attention_output(attended)
        hidden += self.mlp_output(hidden)


class PreNormBlock(Block):
    """The block of Llama: RMS norms before attention and before the MLP. None: the attention and the MLP of Llama."""

    def __init__(
        self, config: NetworkConfig, attention: Attention | None = None, feed_forward: nn.Module | None = None
    ) -> None:
        super().__init__(attention or Attention(config), feed_forward or gated_mlp(config))
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_input(self, hidden: Tensor) -> Tensor:
        return self.input_layernorm(hidden)

    def mlp_output(self, hidden: Tensor) -> Tensor:
        return self.feed_forward(self.post_attention_layernorm(hidden))


def gated_mlp(config: NetworkConfig) -> MLP:
    """The MLP of Llama, in the sizes of `config`."""
    return MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
