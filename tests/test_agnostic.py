"""Policies that know no question: their scores against slow ones, the rotation undone, and who gets which budget."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from test_peak_memory import Alive
from torch import Tensor

from fastkv import LLM, Compactor, ExpectedAttention, FastKVError, FullKV, KeyDiff, SamplingParams
from fastkv.cache import agnostic
from fastkv.cache.policies.agnostic import QueryAgnostic
from fastkv.cache.policy import Observation, ScoreSizes
from fastkv.models.layers import RotaryEmbedding
from fastkv.models.rope_config import RopeConfig

D = 8
YARN = RopeConfig(scaling="yarn", factor=4.0, original_context=64)
ROTARY = RotaryEmbedding(YARN, D)
POLICIES: list[type[QueryAgnostic]] = [KeyDiff, Compactor, ExpectedAttention]
PROMPT = torch.randint(3, 256, (2, 300), generator=torch.Generator().manual_seed(4))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(q: Tensor, k: Tensor, v: Tensor | None = None, first: int = 0, n_past: int = 0) -> Observation:
    """Entries that stand one after the other."""
    positions = torch.arange(first, first + k.shape[2]).expand(k.shape[0], k.shape[1], -1)
    return Observation(0, q, k, k if v is None else v, n_past, positions=positions, rotary=ROTARY)


def example(batch: int = 2, n_tokens: int = 41) -> Observation:
    """Four query heads that share two KV heads."""
    q, k, v = (drawn(batch, heads, n_tokens, D, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    return seen(q, k, v)


# --- before the rotation ---


@pytest.mark.parametrize("config", [RopeConfig(), YARN], ids=["default", "yarn"])
def test_a_rotation_is_undone(config: RopeConfig) -> None:
    rotary = RotaryEmbedding(config, D)
    rotary.reserve(100, torch.float32)
    x, positions = drawn(2, 3, 5, D), torch.tensor([[0, 1, 7, 50, 99], [3, 4, 5, 6, 7]])
    turned = rotary(positions).rotate(x)
    torch.testing.assert_close(rotary.undone(turned, positions.unsqueeze(1)), x, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(turned, x, atol=0.1)
    by_head = torch.stack((positions, positions + 1, positions + 2), dim=1)  # every head has its own
    each = torch.cat([rotary(by_head[:, head]).rotate(x[:, head : head + 1]) for head in range(3)], dim=1)
    torch.testing.assert_close(rotary.undone(each, by_head), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 6])
def test_the_mean_rotation_is_the_mean_of_rotated_vectors(count: int) -> None:
    ROTARY.reserve(100, torch.float32)
    x = drawn(1, 1, 1, D)
    turned = ROTARY(torch.arange(11, 11 + count)[None]).rotate(x.expand(-1, -1, count, -1))
    torch.testing.assert_close(x[0, 0] @ ROTARY.mean(11, count).T, turned[0, 0].mean(0, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Watched(KeyDiff):
    """Keeps what it saw of the first layer before the rotation."""

    name: ClassVar[str] = "watched"
    needs_all_queries: ClassVar[bool] = True
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def between(self, observed: Observation) -> Tensor:
        if observed.layer == 0:
            keys, queries = observed.k.shape[2], observed.q.shape[2]
            self.seen.append((observed.unrotated_keys(0, keys), observed.unrotated_queries(0, queries)))
        return super().between(observed)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen3ForCausalLM"])  # the latter norms q and k
def test_what_a_policy_sees_before_the_rotation(tmp_path: Path, family: str) -> None:
    """In a prompt, and where a sequence continues: its earlier entries stand elsewhere in each head."""
    config = {
        "architectures": [family],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": D,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    policy, ids = Watched(kv_len=30, budgets="even"), torch.arange(100)[None] % 64
    pre = llm.prefill(ids[:, :60], policy)
    kept = pre.kept[0]
    llm.prefill(ids[:, 60:], policy, cache=pre.cache)
    block = llm.model.blocks[0]
    with torch.inference_mode():
        hidden = block.attention_input(llm.model.embed(ids))
        heads = block.self_attn.qkv_proj(hidden).unflatten(-1, (-1, D)).transpose(1, 2)
        q, k = block.self_attn.q_norm(heads[:, :4]), block.self_attn.k_norm(heads[:, 4:6])
    (keys, queries), (all_keys, new_queries) = policy.seen
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(keys, k[:, :, :60], **close)
    torch.testing.assert_close(queries, q[:, :, :60], **close)
    torch.testing.assert_close(new_queries, q[:, :, 60:], **close)
    before = k.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, D))
    assert not torch.equal(kept[0, 0], kept[0, 1])
    torch.testing.assert_close(all_keys, torch.cat((before, k[:, :, 60:]), dim=2), **close)


def test_an_observation_without_a_rotation_says_so() -> None:
    k = drawn(1, 2, 30, D)
    for policy in (Compactor(), ExpectedAttention()):
        with pytest.raises(FastKVError, match="has no rotation"):
            policy.score(Observation(0, k, k, k))


# --- all three ---


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_rows_of_a_batch_are_as_alone_and_the_ends_come_first(policy: type[QueryAgnostic]) -> None:
    made = policy(sinks=3, window=2, min_tokens=8)
    both = example()
    scores = made.score(both)
    assert scores.shape == (2, 2, 39)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert scores[..., :3].min() > scores[..., 3:].max()
    for row in range(2):
        part = slice(row, row + 1)
        alone = made.score(seen(both.q[part], both.k[part], both.v[part]))
        torch.testing.assert_close(alone, scores[part])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_blocks_change_nothing(policy: type[QueryAgnostic], monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy(min_tokens=8) if policy is not Compactor else Compactor(min_tokens=8, chunk=5)
    whole = made.score(example())
    monkeypatch.setattr("fastkv.cache.scores._BLOCK_VALUES", {"cpu": 1})
    monkeypatch.setattr("fastkv.cache.scores._LEAST_QUERIES", 7)
    torch.testing.assert_close(made.score(example()), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("budgets", ["even", "heads", "model"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_budgets_and_ends(tiny_llm: LLM, policy: type[QueryAgnostic], budgets: str) -> None:
    made = policy(kv_len=40, budgets=budgets, sinks=3, window=5)
    assert (made.per_head, made.over_layers) == (budgets != "even", budgets == "model")
    pre = tiny_llm.prefill(PROMPT, made)
    kept = torch.stack([(of_layer >= 0).sum(dim=2) for of_layer in pre.kept])
    assert (kept.sum(dim=(0, 2)) == 6 * 2 * 40).all()
    assert (kept.sum(dim=2) == 80).all() == (budgets != "model")
    assert (kept == 40).all() == (budgets == "even")
    ends = {*range(3), *range(295, 300)}
    assert all(ends <= set(head.tolist()) for of_layer in pre.kept for row in of_layer for head in row)


def test_a_budget_has_room_for_both_ends(tiny_llm: LLM) -> None:
    with pytest.raises(
        FastKVError, match=r"kv_len must be at least sinks and window together \(12\), .*not 11"
    ) as caught:
        KeyDiff(kv_len=11, sinks=8)
    assert caught.value.setting == "kv_len"
    pre = tiny_llm.prefill(PROMPT, KeyDiff(kv_retention=0.01, min_tokens=1, budgets="even"))
    assert [of_layer.shape[2] for of_layer in pre.kept] == [8] * 6
    assert pre.kept[0][0, 0].tolist() == [0, 1, 2, 3, 296, 297, 298, 299]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_the_question_comes_after_the_cache_is_compressed(tiny_llm: LLM, policy: type[QueryAgnostic]) -> None:
    """Whatever the question, the text keeps the same entries; and an answer follows."""
    made = policy(kv_len=40)
    for question in ([5, 6, 7], [9, 8]):
        pre = tiny_llm.prefill(PROMPT[:1], made, max_tokens=20)
        kept = [positions.clone() for positions in pre.kept]
        after = tiny_llm.prefill(torch.tensor([question]), FullKV(), cache=pre.cache, max_tokens=10)
        for layer, before in enumerate(kept):
            now = after.cache.positions(layer)
            assert torch.equal(now[..., : before.shape[2]], before)
            assert now[0, 0, before.shape[2] :].tolist() == list(range(300, 300 + len(question)))
        assert tiny_llm.decode(after.cache, torch.tensor([4])).isfinite().all()


# --- KeyDiff ---


def slow_keydiff(keys: Tensor) -> Tensor:
    """keys [T, D] of one head: one key at a time."""
    unit = [key.double() / key.double().norm() for key in keys]
    mean = sum(unit[1:], unit[0]) / len(unit)
    return torch.stack([-(key @ mean / mean.norm()) for key in unit]).float()


def test_keydiff_is_the_cosine_to_the_mean_key() -> None:
    k = drawn(1, 2, 41, D)
    found = agnostic.unlikeness(k)
    for head in range(2):
        torch.testing.assert_close(found[0, head], slow_keydiff(k[0, head]))
    torch.testing.assert_close(agnostic.unlikeness(k * (1 + drawn(1, 2, 41, 1).abs())), found)  # lengths say nothing


def test_keydiff_drops_what_points_to_the_mean_and_keeps_what_does_not() -> None:
    k = torch.ones(1, 1, 30, D) + 0.1 * drawn(1, 1, 30, D)
    k[0, 0, 7] *= -1
    k[0, 0, 12] = 5.0
    scores = KeyDiff(sinks=0, window=1, min_tokens=8).score(seen(k, k))[0, 0]
    assert int(scores.argmax()) == 7
    assert int(scores.argmin()) == 12


def test_keydiff_chooses_again_where_heads_are_even(tiny_llm: LLM) -> None:
    new = PROMPT[:1, :60]
    for budgets, expected in (("even", 40), ("heads", None)):
        policy = KeyDiff(kv_len=40, budgets=budgets)
        pre = tiny_llm.prefill(PROMPT[:1], policy)
        before = [(of_layer >= 0).sum() for of_layer in pre.kept]
        again = tiny_llm.prefill(new, policy, cache=pre.cache)
        for was, of_layer in zip(before, again.kept, strict=True):
            assert int((of_layer >= 0).sum()) == (2 * expected if expected else int(was) + 2 * 60)


# --- Compactor ---


def outlying(k: Tensor, projection: Tensor | None = None, ridge: float = 1e-9) -> Tensor:
    return agnostic.leverage(lambda start, end: k[:, :, start:end], 0, k.shape[2], 1000, projection, ridge)


def test_leverage_is_the_diagonal_of_the_hat_matrix() -> None:
    k, mixtures = drawn(1, 2, 41, D), agnostic.sketch(D, 5, torch.device("cpu"))
    for head in range(2):
        x = k[0, head].double() @ mixtures.double()
        x -= x.mean(dim=0)
        hat = x @ torch.linalg.inv(x.T @ x + 0.3 * torch.eye(5, dtype=torch.float64)) @ x.T
        torch.testing.assert_close(outlying(k, mixtures, 0.3)[0, head], hat.diagonal().float())
    assert torch.equal(mixtures, agnostic.sketch(D, 5, torch.device("cpu")))


def test_leverages_add_up_to_the_rank_and_know_no_basis() -> None:
    k = drawn(1, 2, 41, D)
    found = outlying(k)
    torch.testing.assert_close(found.sum(dim=-1), torch.full((1, 2), float(D)))
    torch.testing.assert_close(outlying(k @ drawn(D, D, seed=9) + 3), found, atol=1e-4, rtol=1e-4)
    flat = k.clone()
    flat[..., 1:] = 0  # keys of one dimension: the ridge makes it solvable
    torch.testing.assert_close(outlying(flat, ridge=1e-6).sum(dim=-1), torch.ones(1, 2), atol=1e-4, rtol=1e-4)


def test_attention_nearby_in_chunks_of_which_the_last_is_short() -> None:
    q, k = drawn(1, 4, 13, D), drawn(1, 2, 13, D, seed=1)
    found = agnostic.attention_nearby(q, k, 5)
    for head in range(2):
        expected = torch.zeros(13)
        for start, end in ((0, 5), (5, 10), (10, 13)):
            for query in q[0, 2 * head : 2 * head + 2, start:end].flatten(0, 1):
                expected[start:end] += (k[0, head, start:end] @ query).softmax(dim=0) / 2
        torch.testing.assert_close(found[0, head], expected)


def test_compactor_adds_what_it_has_standardised() -> None:
    far, near, v = drawn(2, 2, 20), drawn(2, 2, 20, seed=1).abs(), drawn(2, 2, 20, D, seed=2)
    found = agnostic.compactor_scores(far, near, v, 0.5)
    for row in range(2):
        weighed = near[row] * v[row].norm(dim=-1)
        padded = torch.nn.functional.pad(weighed, (1, 1))
        mean = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
        of_far, of_near = ((x - x.mean()) / x.std(correction=0) for x in (far[row], mean))
        torch.testing.assert_close(found[row], of_far + 0.5 * of_near)


def test_compactor_reads_keys_before_their_rotation() -> None:
    """Where the tokens stand is nothing to the leverage; attention sees rotated keys, and is left out here."""
    ROTARY.reserve(1000, torch.float32)
    x = drawn(1, 2, 41, D)
    turned = [ROTARY.range(first, first + 41).rotate(x) for first in (0, 700)]
    policy = Compactor(min_tokens=8, attention_weight=0.0)
    scores = [policy.score(seen(drawn(1, 4, 41, D), k, first=first)) for first, k in zip((0, 700), turned, strict=True)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)
    elsewhere = replace(seen(drawn(1, 4, 41, D), turned[1]), positions=torch.zeros(1, 2, 41, dtype=torch.int64))
    assert not torch.allclose(policy.score(elsewhere), scores[1], atol=0.1)


# --- Expected Attention ---


def test_moments_of_queries() -> None:
    q = drawn(2, 3, 41, D)
    mean, covariance = agnostic.query_moments(lambda start, end: q[:, :, start:end], 4, 41, 7)
    torch.testing.assert_close(mean, q[:, :, 4:].mean(dim=2))
    torch.testing.assert_close(covariance[1, 2], torch.cov(q[1, 2, 4:].T, correction=0))


def test_without_covariance_it_is_the_attention_of_one_query() -> None:
    q, k = drawn(1, 4, D), drawn(1, 2, 21, D, seed=1)
    found = agnostic.expected_attention(k, q, torch.zeros(1, 4, D, D))
    for head in range(2):
        rows = (q[0, 2 * head : 2 * head + 2] @ k[0, head].T / D**0.5).softmax(dim=-1)
        torch.testing.assert_close(found[0, head], rows.mean(dim=0))


def test_it_is_the_mean_over_many_queries_that_stand_there() -> None:
    """Monte Carlo for one future position: queries with these moments, turned to it, and what they add up to."""
    ROTARY.reserve(100, torch.float32)
    k, root = drawn(1, 1, 6, D), 0.4 * drawn(D, D, seed=1)
    mean, covariance = drawn(D, seed=2), root @ root.T
    queries = mean + drawn(400_000, D, seed=3) @ root.T
    turned = ROTARY.range(50, 51).rotate(queries[None, None])[0, 0]
    weights = (turned @ k[0, 0].T / D**0.5).double().exp().mean(dim=0)
    turn = ROTARY.mean(50, 1)
    found = agnostic.expected_attention(k, (turn @ mean)[None, None], (turn @ covariance @ turn.T)[None, None])
    torch.testing.assert_close(found[0, 0].double(), weights / weights.sum(), atol=5e-3, rtol=2e-2)


def test_expected_attention_by_hand() -> None:
    """Of the policy as a whole: queries from after the sinks, turned to after the prompt, and values."""
    observed = example(batch=1)
    policy = ExpectedAttention(sinks=3, window=2, min_tokens=8, future=5, epsilon=0.02)
    q = ROTARY.undone(observed.q, torch.arange(41)[None, None])[0, :, 3:]
    turn = ROTARY.mean(41, 5)
    for head in range(2):
        k, expected = observed.k[0, head, 3:], torch.zeros(38)
        for one in q[2 * head : 2 * head + 2]:
            mean, covariance = turn @ one.mean(dim=0), turn @ torch.cov(one.T, correction=0) @ turn.T
            logits = k @ mean / D**0.5 + torch.einsum("td,de,te->t", k, covariance, k) / (2 * D)
            expected += logits.softmax(dim=0) / 2
        expected = (expected + 0.02) * observed.v[0, head, 3:].norm(dim=-1)
        torch.testing.assert_close(policy.score(observed)[0, head, 3:], expected[:-2], atol=1e-5, rtol=1e-4)


def test_the_scale_of_values_is_irrelevant() -> None:
    observed, policy = example(), ExpectedAttention(epsilon=0.0, min_tokens=8)
    larger = seen(observed.q, observed.k, 4 * observed.v)
    torch.testing.assert_close(policy.score(larger)[..., 4:], 4 * policy.score(observed)[..., 4:])


# --- memory ---


@pytest.mark.parametrize("settings", [{"sketch": 0, "chunk": 64}, {"sketch": 200, "chunk": 4096}], ids=str)
def test_what_compactor_says_that_it_holds(settings: dict[str, Any]) -> None:
    """Alone, without a model: what is alive while it scores."""
    policy = Compactor(min_tokens=8, **settings)
    observed = example(batch=1, n_tokens=900)
    with Alive(torch.nn.Identity()) as alive:
        policy.score(observed)
    said = 4 * policy.scratch(ScoreSizes(1, 4, 2, D, 900, torch.device("cpu")))
    assert 0.85 * alive.peak < said < 1.3 * alive.peak


def test_answers_come(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for policy in POLICIES:
        assert len(tiny_llm.generate(PROMPT[0].tolist(), params, policy(kv_len=40)).token_ids) == 4


# --- with TSP ---


@pytest.mark.parametrize("policy", [KeyDiff(tsp_rate=0.5), Compactor(tsp_rate=0.5), ExpectedAttention(tsp_rate=0.5)])
@pytest.mark.parametrize("budgets", ["even", "heads"])
def test_the_best_sums_of_the_same_scores_are_propagated(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, policy: QueryAgnostic, budgets: str
) -> None:
    policy = replace(policy, kv_retention=0.3, min_tokens=10, tsp_layer=2, budgets=budgets)
    scored: list[torch.Tensor] = []
    real = type(policy).score

    def noted(self: QueryAgnostic, observed: Observation) -> torch.Tensor:
        scored.append(real(self, observed))
        return scored[-1]

    monkeypatch.setattr(type(policy), "score", noted)
    ids = torch.randint(3, 256, (120,), generator=torch.Generator().manual_seed(3)).tolist()
    pre = tiny_llm.prefill(ids, policy, 4)
    assert pre.layer_tokens == [120] * 3 + [60] * 3
    best = scored[2].double().sum(dim=1)[0].topk(60 - policy.window).indices.tolist()
    assert pre.tokens[3][0].tolist() == sorted([*best, *range(120 - policy.window, 120)])
    assert all((kept >= 0).sum() == 36 * 2 for kept in pre.kept)  # 30 % of 120, of both heads


def test_layers_that_compete_see_the_same_tokens() -> None:
    with pytest.raises(FastKVError, match="tsp_rate below 1 does not go with budgets of the whole model"):
        KeyDiff(tsp_rate=0.5, budgets="model")
    with pytest.raises(FastKVError, match=r"tsp_layer must be below the model's number of layers \(6\), not 6"):
        KeyDiff(tsp_layer=6).validate(6)
