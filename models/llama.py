"""The Llama network: embed, rope, layers, head. No loop over a request, no cache, no policy.

Attention and MLP of a block are apart, and attention itself is handed in, so that the engine can stand between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastkv.models.config import ModelConfig
from fastkv.models.layers import MLP, RMSNorm, Rope, RotaryEmbedding
from fastkv.models.linear import Linear, linear

# (q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, D]), q and k rotated -> [B, Hq, T, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Grouped-query attention without the attention: projections, head norms and rotation.

    q, k and v are one matrix: rows [q; k; v].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project(self, hidden: Tensor, rope: Rope, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, E], normed -> q [B, Hq, T, D], k and v [B, Hkv, T, D], q and k rotated.

        They are views of `out`, [B, Hq + 2 Hkv, T, D], if there is one.
        """
        n_q, n_k, n_v = self.heads
        heads = self._split(self.qkv_proj(hidden))
        turning, v = heads.split((n_q + n_k, n_v), dim=1)
        turning = self._normed(turning, n_q)
        if out is None:
            q, k = rope.rotate(turning).split((n_q, n_k), dim=1)
            return q, k, v
        rope.rotate(turning, out=out[:, : n_q + n_k])
        out[:, n_q + n_k :] = v
        q, k, v = out.split(self.heads, dim=1)
        return q, k, v

    def project_q(self, hidden: Tensor, rope: Rope) -> Tensor:
        """hidden [B, T, E], normed -> q [B, Hq, T, D] alone, rotated."""
        q = self._split(self._rows(hidden, 0, self.heads[0]))
        return rope.rotate(self.q_norm(q))

    def project_kv(self, hidden: Tensor, rope: Rope, out: Tensor) -> None:
        """hidden [B, T, E], normed -> k, rotated, and v into `out` [B, 2 Hkv, T, D]."""
        n_k = self.heads[1]
        heads = self._split(self._rows(hidden, self.heads[0], sum(self.heads)))
        rope.rotate(self.k_norm(heads[:, :n_k]), out=out[:, :n_k])
        out[:, n_k:] = heads[:, n_k:]

    def _normed(self, heads: Tensor, n_q: int) -> Tensor:
        """The head norms of a family that has them, over the n_q query heads and the key heads behind them."""
        if isinstance(self.q_norm, nn.Identity):
            return heads
        return torch.cat((self.q_norm(heads[:, :n_q]), self.k_norm(heads[:, n_q:])), dim=1)

    def output(self, attended: Tensor) -> Tensor:
        """attended [B, Hq, T, D] -> [B, T, E]."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _rows(self, hidden: Tensor, first: int, end: int) -> Tensor:
        """The product with the heads first … end - 1 of the one matrix."""
        part = slice(first * self.head_dim, end * self.head_dim)
        bias = None if self.qkv_proj.bias is None else self.qkv_proj.bias[part]
        return linear(hidden, self.qkv_proj.weight[part], bias)

    def _split(self, heads: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """One decoder layer, whole (`attention`, then `mlp`) or in the steps that a prefill takes (`project…`, `finish_`).

    Norms and residuals are added here, whichever way is taken.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def attention(self, hidden: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """hidden [B, T, E] -> [B, T, E]; `attend` sees this layer's rotated q and k, and v."""
        return hidden + self.self_attn.output(attend(*self.project(hidden, rope)))

    def mlp(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, E] -> [B, T, E]."""
        return hidden + self.feed_forward(self.post_attention_layernorm(hidden))

    def project(self, hidden: Tensor, rope: Rope, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, E] -> q [B, Hq, T, D], k and v [B, Hkv, T, D], q and k rotated; views of `out` if given."""
        return self.self_attn.project(self.input_layernorm(hidden), rope, out)

    def project_q(self, hidden: Tensor, rope: Rope) -> Tensor:
        """The q of `project` alone."""
        return self.self_attn.project_q(self.input_layernorm(hidden), rope)

    def project_kv(self, hidden: Tensor, rope: Rope, out: Tensor) -> None:
        """The k and v of `project` alone, into `out` [B, 2 Hkv, T, D]."""
        self.self_attn.project_kv(self.input_layernorm(hidden), rope, out)

    def finish_(self, hidden: Tensor, attended: Tensor) -> None:
        """What follows attention, written into hidden [B, T, E]; attended: [B, Hq, T, D]."""
        hidden += self.self_attn.output(attended)
        hidden += self.feed_forward(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Embedding, blocks and head of any supported family."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not nn.Embedding(V, E): drawing its values on the meta device makes torch import symbolic mathematics.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.tie()

    def tie(self) -> None:
        """Let the head be the embedding, where the checkpoint says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers, first to last, as what they are (ModuleList forgets the type)."""
        return cast("Sequence[Block]", self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """ids int64 [B, T] -> hidden [B, T, E], in `out` if there is one."""
        if out is None:
            return self.embed_tokens(ids)
        torch.index_select(self.embed_tokens.weight, 0, ids.flatten(), out=out.flatten(0, 1))
        return out

    def reserve(self, n_positions: int) -> None:
        """Let `rope` know the positions below `n_positions`."""
        self.rotary.reserve(n_positions, self.dtype)

    def rope(self, positions: Tensor) -> Rope:
        """positions int64 [B, T], the original ones, all reserved -> the rotation of those positions."""
        return self.rotary(positions)

    def rope_of_range(self, first: int, n_tokens: int) -> Rope:
        """The rotation of the positions first … first + n_tokens - 1."""
        self.reserve(first + n_tokens)
        return self.rotary.first(first + n_tokens).at(first, first + n_tokens)

    def rope_of_first(self, n_tokens: int) -> Rope:
        """The rotation of the positions 0 … n_tokens - 1."""
        self.reserve(n_tokens)
        return self.rotary.first(n_tokens)

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [B, E] -> logits float32 [B, V]."""
        return self.lm_head(self.norm(hidden)).float()
