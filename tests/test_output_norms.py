"""Policies that ask what a value adds to the hidden states: the norms themselves, CriticalKV, DefensiveKV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, AdaKV, CriticalAdaKV, CriticalKV, DefensiveKV, FastKVError, SnapKV
from fastkv.cache.policy import Observation
from fastkv.cache.selection import select_entries
from fastkv.engine.output_norms import output_norms
from fastkv.models.block import Attention

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))


def slow_norms(attention: Attention, x: Tensor, norm: int) -> Tensor:
    """x [B, Hkv, G, n, D]: the output projection of each head by itself."""
    _, n_kv_heads, group, _, head_dim = x.shape
    found = torch.zeros(x.shape[:-1])
    for head in range(n_kv_heads * group):
        weight = attention.o_proj.weight[:, head * head_dim : (head + 1) * head_dim]
        outputs = x[:, head // group, head % group] @ weight.T
        found[:, head // group, head % group] = torch.linalg.vector_norm(outputs, ord=norm, dim=-1)
    return found


@pytest.mark.parametrize("values", [2**21, 1, 4 * 12 * 7])
@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
@torch.inference_mode()
def test_norms_are_those_of_the_projected_values(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, norm: str, order: int, values: int
) -> None:
    """Of values that a group shares, and of ones that each query head has for itself; in chunks."""
    monkeypatch.setattr("fastkv.engine.output_norms._CHUNK_VALUES", {"cpu": values})
    attention = tiny_llm._model.blocks[1].self_attn
    own = torch.randn(2, 2, 2, 13, attention.head_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output_norms(attention, own, norm), slow_norms(attention, own, order))
    shared = own[:, :, :1]
    expected = slow_norms(attention, shared.expand_as(own), order)
    torch.testing.assert_close(output_norms(attention, shared, norm), expected)


@torch.no_grad()
def test_the_gram_matrices_are_made_once_and_again_where_weights_change(tiny_llm: LLM) -> None:
    config = tiny_llm._model.config
    attention = Attention(config)  # type: ignore[arg-type]
    first = attention.output_gram()
    assert attention.output_gram() is first
    assert first.shape == (config.n_heads, config.head_dim, config.head_dim)
    attention.o_proj.weight.mul_(2)
    torch.testing.assert_close(attention.output_gram(), 4 * first)


def test_an_observation_without_a_model_says_so() -> None:
    k = torch.zeros(1, 2, 9, 4)
    with pytest.raises(FastKVError, match="no output projection"):
        Observation(0, k, k, k).output_norms(k, "l1")


# --- CriticalKV ---


def observed(norms: Callable[[Tensor, str], Tensor], n_tokens: int = 60) -> Observation:
    """A layer of 2 KV and 4 query heads, with norms of one's own choice."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 2, n_tokens, 8, generator=generator)
    return Observation(0, q, k, torch.randn(1, 2, n_tokens, 8, generator=generator), output=norms)


def constant(x: Tensor, norm: str) -> Tensor:
    return torch.full((*x.shape[:2], 2, x.shape[3]), 3.0)


@pytest.mark.parametrize("policy", [CriticalKV, CriticalAdaKV])
def test_constant_norms_change_nothing(policy: type[CriticalKV]) -> None:
    made = policy(kernel=1)
    seen = observed(constant)
    scores = made.score(seen)
    counts: Any = 20
    if made.per_head:
        counts = made.head_budgets(0, 1, 20, scores)
        assert torch.equal(counts, AdaKV().head_budgets(0, 1, 20, scores))
    ranking = made.ranking(seen, scores, counts)
    for head, count in enumerate(counts[0].tolist() if made.per_head else (20, 20)):
        found, expected = (select_entries(one[:, head : head + 1], count, 8) for one in (ranking, scores))
        assert torch.equal(found, expected)


def test_half_by_attention_and_half_by_norms_too(tiny_llm: LLM) -> None:
    """A slow twin, of every layer: 40 entries, of which 8 are the window and 16 the best-scored."""
    seen: list[tuple[Tensor, Tensor]] = []
    ranking = CriticalKV.ranking

    def watch(self: CriticalKV, one: Observation, scores: Tensor, counts: Tensor | int) -> Tensor:
        values = one.v.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        norms = slow_norms(tiny_llm._model.blocks[one.layer].self_attn, values, 1)
        seen.append((scores, norms.mean(2)[..., :292]))
        return ranking(self, one, scores, counts)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(CriticalKV, "ranking", watch)
        kept = tiny_llm.prefill(PROMPT, CriticalKV(kv_len=40, kernel=1)).kept
    for layer, (scores, norms) in enumerate(seen):
        for head in range(2):
            order = scores[0, head].argsort(descending=True).tolist()
            rest = sorted(order[16:], key=lambda token: -float((scores[0, head, token] + 1e-4) * norms[0, head, token]))
            assert sorted(order[:16] + rest[:16]) + list(range(292, 300)) == kept[layer][0, head].tolist()
    plain = tiny_llm.prefill(PROMPT, SnapKV(kv_len=40, kernel=1)).kept
    assert not all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True)), "the norms chose nothing"


@pytest.mark.parametrize("policy", [CriticalKV, CriticalAdaKV])
def test_norms_of_zero_keep_the_number(
    tiny_llm: LLM, policy: type[CriticalKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkv.engine.prefill.output_norms", lambda attention, x, norm: 0 * constant(x, norm))
    pre = tiny_llm.prefill(PROMPT, policy(kv_len=40))
    assert all(int((kept >= 0).sum()) == 80 for kept in pre.kept)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ada_keeps_the_best_half_of_each_heads_budget(norm: str) -> None:
    made = CriticalAdaKV(norm=norm, head_floor=0.0, kernel=1)
    seen = observed(lambda x, norm: torch.rand(1, 2, 2, x.shape[3], generator=torch.Generator().manual_seed(4)))
    scores = made.score(seen)
    counts = torch.tensor([[30, 10]])
    ranking = made.ranking(seen, scores, counts)
    for head, half in ((0, 11), (1, 1)):
        best = set(scores[0, head].topk(half).indices.tolist())
        assert set(ranking[0, head].isinf().nonzero().flatten().tolist()) == best


def test_the_sinks_are_chosen_before_anything() -> None:
    made = CriticalKV(sinks=3)
    seen = observed(constant)
    assert made.ranking(seen, made.score(seen), 8 + 1)[..., :3].isinf().all()


def test_the_norm_is_a_choice(tiny_llm: LLM) -> None:
    l1, l2 = (tiny_llm.prefill(PROMPT, CriticalKV(kv_len=40, norm=norm)).kept for norm in ("l1", "l2"))
    assert not all(torch.equal(a, b) for a, b in zip(l1, l2, strict=True))


# --- DefensiveKV ---


def attending(rows: Tensor) -> Observation:
    """A layer whose queries, in 8 rows for each of 4 query heads, attend as `rows` [4, 8, n] say to n tokens."""
    n_tokens = rows.shape[-1]
    logits = torch.full((4, 8, n_tokens + 8), -30.0)
    logits[..., :n_tokens] = rows.clamp_min(1e-12).log()
    keys = torch.eye(n_tokens + 8)[None, None].expand(1, 2, -1, -1)
    q = logits[None] * (n_tokens + 8) ** 0.5
    return Observation(0, q, keys, keys, output=constant)


def test_one_strong_query_suffices() -> None:
    """One query of one query head attends to a token more than all do to another: the mean takes the other one."""
    rows = torch.full((4, 8, 50), 0.4 / 48)
    rows[:, :, 30] = 0.1
    rows[2, 5, 20] = 0.15
    rows /= rows.sum(dim=-1, keepdim=True)
    made = DefensiveKV(kernel=1, certain_mass=0.0, kv_len=9)
    scores = made.score(attending(rows))[0]
    assert scores[1].argmax() == 20
    assert scores[0].argmax() == 30  # of the other KV head
    assert SnapKV(kernel=1).score(attending(rows))[0, 1].argmax() == 30


def test_queries_that_agree_are_their_mean() -> None:
    rows = torch.rand(50, generator=torch.Generator().manual_seed(0)).expand(4, 8, -1)
    rows = rows / rows.sum(dim=-1, keepdim=True)
    scores = DefensiveKV(kernel=1, certain_mass=0.0).score(attending(rows))[0, 0]
    expected = rows[0].mean(dim=0).clamp_min(1 / 50) / 2  # constant norms: each of two heads has half
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_average_pooling_keeps_the_mass_of_a_query() -> None:
    """At the prompt's edge the zeros of the padding would take some."""
    rows = torch.zeros(4, 8, 50)
    rows[:, :, 0] = 1.0
    found = DefensiveKV(certain_mass=0.0)._rows(attending(rows), rows[None].unflatten(1, (2, 2)))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 2, 2, 8))
    assert found[0, 0, 0, 0, :4].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def test_tokens_that_hold_the_mass_are_certain() -> None:
    """As many as fit below it, and no more than the mean budget."""
    rows = torch.full((4, 8, 50), 0.1 / 46)
    rows[:, :, 40:44] = torch.tensor([0.4, 0.2, 0.2, 0.1])
    for mass, kv_len, expected in ((0.85, 20, 3), (0.85, 10, 2), (0.5, 20, 1), (0.0, 20, 0)):
        made = DefensiveKV(certain_mass=mass, kv_len=kv_len)
        certain = made._certain(rows[None].unflatten(1, (2, 2)).mean(dim=(2, 3)))
        assert certain[0, 0].nonzero().flatten().tolist() == list(range(40, 40 + expected))


def test_the_windows_own_mass_counts() -> None:
    mean = torch.full((1, 1, 10), 0.02)  # the window holds 0.8
    assert DefensiveKV(kv_len=18)._certain(mean).sum() == 4


@pytest.mark.parametrize(
    "settings",
    [{"certain_mass": 0.3}, {"certain_mass": 0.3, "norm": "l2"}, {"pooling": "forward", "sinks": 1, "values": True}],
)
def test_defensive_budgets_add_up(tiny_llm: LLM, settings: dict[str, Any]) -> None:
    pre = tiny_llm.prefill(PROMPT, DefensiveKV(kv_len=40, head_floor=0.0, **settings))
    counts = [(kept >= 0).sum(dim=2)[0].tolist() for kept in pre.kept]
    assert [sum(of_layer) for of_layer in counts] == [80] * 6
    if "certain_mass" in settings:
        assert any(first != second for first, second in counts)
    else:  # attention is spread so widely that every budget goes to what is certain
        assert all(first == second for first, second in counts)
        assert all((kept[0, :, 0] == 0).all() for kept in pre.kept)
