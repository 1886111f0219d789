"""TOVA: one set of entries for all KV heads of a layer."""

from __future__ import annotations

from typing import Any

import torch

from fastkv import LLM, TOVA, SnapKV
from fastkv.cache.policy import Observation

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))


def test_all_heads_keep_the_same(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, TOVA(kv_len=40))
    other = tiny_llm.prefill(PROMPT, SnapKV(kv_len=40))
    assert all(torch.equal(kept[:, 0], kept[:, 1]) for kept in pre.kept)
    assert not all(torch.equal(kept[:, 0], kept[:, 1]) for kept in other.kept)


def test_scores_are_the_last_querys_attention_over_all_heads() -> None:
    """Against the whole softmax row of each query head; the last token alone is the window."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 20, 8, generator=generator), torch.randn(2, 2, 20, 8, generator=generator)
    rows = (q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5).softmax(-1)[:, :, 0]
    scores = TOVA().score(Observation(0, q, k, k))
    torch.testing.assert_close(scores, (rows.sum(1, keepdim=True) / 2).expand(-1, 2, -1)[..., :-1])


def test_only_the_last_token_is_certain(tiny_llm: LLM) -> None:
    kept = tiny_llm.prefill(PROMPT, TOVA(kv_len=1)).kept
    assert all(entries.tolist() == [[[299], [299]]] for entries in kept)


def test_the_scores_settings_are_honoured(tiny_llm: LLM) -> None:
    """A wider window and forward pooling, as in every policy that the last tokens score."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 30, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
    settings: dict[str, Any] = {"window": 6, "pooling": "forward", "reach": 3}
    ours, base = TOVA(**settings), SnapKV(**settings)
    observed = Observation(0, q, k, k)
    torch.testing.assert_close(ours.score(observed)[:, 0], base.score(observed).mean(dim=1))
