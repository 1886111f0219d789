"""Every policy keeps the same promises; then what each of them is about."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from caches import live_entries
from torch import Tensor

from fastkv import H2O, LLM, FastKV, FastKVError, FullKV, PyramidInfer, PyramidKV, SamplingParams, SnapKV, StreamingLLM
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.policy import FirstPass, Observation, Policy, Stage, plan_layers
from fastkv.cache.pool import round_up
from fastkv.cache.scores import received_attention, recent_attention
from fastkv.engine.prefill import Prefill

N_TOKENS = 300
PROMPT = torch.randint(3, 256, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
BUDGETED = [name for name in POLICIES if name not in ("full", "pyramidinfer", "dbudget")]  # a budget of so many a layer
ONLINE = ("structkv", "asl")  # where tokens are dropped shows during the prefill


def make(name: str, n_layers: int = 6, **settings: Any) -> Policy:
    """The policy; headkv with a table for a model of so many layers and two KV heads."""
    if name == "headkv":
        settings["head_scores"] = [[0.1 * layer, 1.0 + layer % 3] for layer in range(n_layers)]
    return POLICIES[name](**settings)


def small(name: str, n_layers: int = 6) -> Policy:
    """The policy at a budget of 40 of the 300 tokens.

    pyramidinfer has none, and falls from layer to layer; dbudget finds its own.
    """
    if name == "dbudget":
        return make(name, full_layers=1, drop_norm=0.2, min_tokens=8)
    if name == "pyramidinfer":
        return make(name, first_layer=1, decay=0.6, floor=0.1, min_tokens=8)
    if name == "sinkrouter":
        return make(name, kv_len=40, tau=2)  # skips nothing; the others of its kind read 128 entries at least
    return make(name, n_layers, kv_len=40) if name != "full" else make(name)


def unbounded(name: str) -> Policy:
    """Budgets of the whole prompt and more."""
    if name == "dbudget":
        return make(name, drop_norm=0)
    if name == "pyramidinfer":
        return make(name, decay=1.0)
    if name == "sinkrouter":
        return make(name, kv_len=999, tau=2)
    known = {field.name for field in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]
    return make(name, **{setting: 999 for setting in ("kv_len", "tsp_len", "read_len") if setting in known})


def counts(kept: Tensor) -> Tensor:
    """Entries of each sequence and head, int64 [B, Hkv]; a short one is filled up with -1."""
    return (kept >= 0).sum(dim=2)


def entries_of(pre: Prefill, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """K and V [n, D] that the cache holds of the first sequence, found by what the device knows of it."""
    return live_entries(pre.cache.pool, layer, 0, head)


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_of_the_whole_prompt_is_the_full_cache(tiny_llm: LLM, name: str) -> None:
    full, same = tiny_llm.prefill(PROMPT, FullKV()), tiny_llm.prefill(PROMPT, unbounded(name))
    assert torch.equal(full.logits, same.logits)
    for layer in range(6):
        assert torch.equal(full.kept[layer], same.kept[layer])
        for head in range(2):
            pairs = zip(entries_of(full, layer, head), entries_of(same, layer, head), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_counts_and_bytes_are_as_promised(tiny_llm: LLM, name: str, batch: int) -> None:
    policy, config = small(name), tiny_llm.config
    ids = torch.randint(3, 256, (batch, N_TOKENS), generator=torch.Generator().manual_seed(2))
    pre = tiny_llm.prefill(ids, policy, max_tokens=10)
    plans = plan_layers(policy, config.n_layers, N_TOKENS)
    for layer, (plan, tokens, kept) in enumerate(zip(plans, pre.tokens, pre.kept, strict=True)):
        assert tokens.shape[0] == kept.shape[0] == batch
        assert tokens.shape[1] <= plan.seen if name in ONLINE else tokens.shape[1] == plan.seen
        assert policy.over_layers or name == "dbudget" or counts(kept).sum(dim=1).eq(2 * plan.kept).all()
        assert (counts(kept) >= plan.least).all() or plan.least == plan.kept
        assert policy.per_head or (counts(kept) == plan.kept).all()
        assert torch.equal(pre.cache.lengths[layer], counts(kept))
        assert torch.equal(pre.cache.positions(layer), kept) or name == "gemfilter"  # which reads its choice anew
    totals = sum(counts(kept).sum(dim=1) for kept in pre.kept)
    if name == "dbudget":
        assert (totals < 0.9 * 2 * 6 * N_TOKENS).all()  # type: ignore[operator]
    else:
        assert totals.tolist() == [2 * sum(plan.kept for plan in plans)] * batch  # type: ignore[union-attr]
    if name in BUDGETED:
        assert sum(plan.kept for plan in plans) == 40 * len(plans)
    assert pre.cache.entries == totals[0]  # type: ignore[index]
    capacity = sum(round_up(plan.kept + 10) for plan in plans)
    assert pre.cache.nbytes == batch * 2 * capacity * config.n_kv_heads * config.head_dim * 4


@pytest.mark.parametrize("name", POLICIES)
def test_kept_positions_ascend_are_unique_and_were_seen(tiny_llm: LLM, name: str) -> None:
    policy = small(name)
    pre = tiny_llm.prefill(PROMPT, policy)
    for tokens, of_layer in zip(pre.tokens, pre.kept, strict=True):
        assert of_layer.dtype == torch.int64
        for of_head in of_layer[0]:
            kept = of_head[of_head >= 0]
            assert (of_head[len(kept) :] == -1).all()
            assert (kept.diff() > 0).all()
            assert 0 <= int(kept.min()) <= int(kept.max()) == N_TOKENS - 1
            assert set(kept.tolist()) <= set(tokens.flatten().tolist())
            assert (kept[-policy.window :] >= N_TOKENS - policy.window).all() or policy.window == 0


@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_decoding_is_attention_over_the_kept_entries(tiny_llm: LLM, name: str) -> None:
    """The slow twin attends with each head to the entries that it keeps, and adds one a step."""
    model, policy = tiny_llm._model, small(name)
    pre = tiny_llm.prefill(PROMPT, policy)
    heads = range(model.config.n_kv_heads)
    entries = [[entries_of(pre, layer, head) for head in heads] for layer in range(model.config.n_layers)]
    if pre.tokens[-1].shape[1] == N_TOKENS:  # no context reduction: the entries are those of a full cache
        full = tiny_llm.prefill(PROMPT, FullKV())
        for layer, head in itertools.product(range(model.config.n_layers), heads):
            positions = pre.kept[layer][0, head]
            for found, everything in zip(entries[layer][head], entries_of(full, layer, head), strict=True):
                torch.testing.assert_close(found, everything[positions[positions >= 0]], atol=1e-5, rtol=1e-5)
    first = 40 if name == "gemfilter" else N_TOKENS  # there, the chosen tokens are a prompt of their own
    for step, token in enumerate((17, 4, 250)):
        hidden = model.embed(torch.tensor([[token]]))
        rope = model.rope(torch.tensor([[first + step]]))
        for layer, block in enumerate(model.blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                out = torch.empty_like(q)
                for head in heads:
                    kept = [
                        torch.cat((old, new[0, head])) for old, new in zip(entries[layer][head], (k, v), strict=True)
                    ]
                    entries[layer][head] = (kept[0], kept[1])
                    group = slice(head * q.shape[1] // len(heads), (head + 1) * q.shape[1] // len(heads))
                    out[0, group] = (q[0, group] @ kept[0].T / q.shape[-1] ** 0.5).softmax(-1) @ kept[1]
                return out

            hidden = block.mlp(block.attention(hidden, rope, attend))
        expected = model.head(hidden[:, -1])
        torch.testing.assert_close(tiny_llm.decode(pre.cache, torch.tensor([token])), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_prompts_of_one_tensor_are_decoded_as_alone(tiny_llm: LLM, name: str) -> None:
    """One prefill and one cache for two prompts. Where tokens are dropped, they decide together: not compared."""
    if name in ONLINE:
        pytest.skip("prompts of one tensor have one TSP layer")
    ids = torch.randint(3, 256, (2, N_TOKENS), generator=torch.Generator().manual_seed(5))
    together = tiny_llm.prefill(ids, small(name))
    alone = [tiny_llm.prefill(prompt[None], small(name)) for prompt in ids]
    for token in (9, 77):
        steps = torch.full((2,), token)
        logits = tiny_llm.decode(together.cache, steps)
        expected = torch.cat([tiny_llm.decode(pre.cache, steps[:1]) for pre in alone])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_in_a_batch_each_is_as_alone(tiny_llm: LLM, name: str) -> None:
    prompts = [PROMPT[0, :count].tolist() for count in (300, 41, 9)]
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    alone = [tiny_llm.generate(prompt, params, small(name)).token_ids for prompt in prompts]
    together = tiny_llm.generate(prompts, params, small(name), batch_size=2)
    assert [output.token_ids for output in together] == alone


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
}


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    config = {
        "architectures": [request.param],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        **FAMILIES[request.param],
    }
    folder = tmp_path_factory.mktemp("family")
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(folder, dtype="float32", device="cpu", load_format="dummy")


@pytest.mark.parametrize("name", POLICIES)
def test_on_every_family(of_family: LLM, name: str) -> None:
    prompt, params = [n % 64 for n in range(200)], SamplingParams(max_tokens=3, ignore_eos=True)
    out = of_family.generate(prompt, params, small(name, 4))
    assert len(out.token_ids) == 3
    if name in BUDGETED:
        assert out.metrics.kv_tokens == 40


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("n_tokens", [11, 12, 41])
def test_one_entry_too_many(tiny_llm: LLM, name: str, n_tokens: int) -> None:
    """The shortest prompts that lose anything, by a budget of one entry less; and twice the same."""
    policy = make(name, kv_len=n_tokens - 1)
    plans = plan_layers(policy, 6, n_tokens)
    first, second = (tiny_llm.prefill(PROMPT[:, :n_tokens], policy) for _ in range(2))
    found, planned = [int(counts(kept).sum()) for kept in first.kept], [2 * plan.kept for plan in plans]
    assert (sum(found) == sum(planned)) if policy.over_layers else (found == planned)
    assert all(torch.equal(a, b) for a, b in zip(first.kept, second.kept, strict=True))
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name", BUDGETED)
def test_settings_out_of_range_are_refused(name: str) -> None:
    for settings in ({"kv_retention": 0}, {"kv_retention": 1.1}, {"kv_len": 0}, {"min_tokens": 0}, {"kv_len": 1.5}):
        with pytest.raises(FastKVError) as caught:
            make(name, **settings)
        assert caught.value.setting == next(iter(settings))


@pytest.mark.parametrize("name", POLICIES)
def test_settings_are_told_by_name(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]
    assert set(make(name).settings(6)) == fields


# --- what each of them is about ---


@pytest.mark.parametrize("settings", [{}, {"kv_retention": 0.2, "pooling": "avg"}, {"kv_len": 50, "window": 16}])
def test_snapkv_is_fastkv_without_tsp(tiny_llm: LLM, settings: dict[str, Any]) -> None:
    settings = {"min_tokens": 16, **settings}
    ours = tiny_llm.prefill(PROMPT, SnapKV(**settings))
    other = tiny_llm.prefill(PROMPT, FastKV.paper(tsp_rate=1.0, **settings))
    assert all(torch.equal(a, b) for a, b in zip(ours.kept, other.kept, strict=True))
    assert torch.equal(ours.logits, other.logits)


@pytest.mark.parametrize("n_layers", [1, 2, 7, 32])
@pytest.mark.parametrize("kv_len", [9, 40, 128, 2000])
def test_pyramids_have_the_mean_and_fall(n_layers: int, kv_len: int) -> None:
    budgets = [PyramidKV(kv_len=kv_len).budget(layer, n_layers, 100_000) for layer in range(n_layers)]
    assert sum(budgets) == n_layers * kv_len
    assert all(low <= high + 1 for high, low in itertools.pairwise(budgets))
    assert min(budgets) >= 8
    if n_layers > 1 and kv_len >= 40:
        exact = (kv_len - 8) / 20
        assert budgets[-1] == pytest.approx(8 + exact, abs=1)
        assert budgets[0] == pytest.approx(8 + 2 * (kv_len - 8) - exact, abs=1)


def test_the_first_tokens_and_the_last_are_what_streamingllm_keeps(tiny_llm: LLM) -> None:
    for sinks, expected in ((4, [0, 1, 2, 3, *range(264, 300)]), (0, list(range(260, 300)))):
        pre = tiny_llm.prefill(PROMPT, StreamingLLM(kv_len=40, sinks=sinks))
        for kept in pre.kept:
            assert kept[0, 0].tolist() == kept[0, 1].tolist() == expected
    for settings in ({"sinks": -1}, {"kv_len": 4}, {"min_tokens": 4}, {"kv_len": 10, "sinks": 10}):
        with pytest.raises(FastKVError):
            StreamingLLM(**settings)


def slow_received(q: Tensor, k: Tensor) -> Tensor:
    """The whole T x T matrix of every head."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), float("-inf")).softmax(-1)
    return weights.sum(2).unflatten(1, (k.shape[1], -1)).sum(2)


@pytest.mark.parametrize(("values", "least"), [(2**24, 8), (700, 1), (1, 1), (1, 8)])
def test_attention_received_is_summed_block_by_block(monkeypatch: pytest.MonkeyPatch, values: int, least: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("fastkv.cache.scores._BLOCK_VALUES", {"cpu": values})
    monkeypatch.setattr("fastkv.cache.scores._LEAST_QUERIES", least)
    q, k = torch.randn(2, 6, 37, 8), torch.randn(2, 2, 37, 8)
    torch.testing.assert_close(received_attention(q, k), slow_received(q, k), atol=1e-5, rtol=1e-5)


def test_h2o_keeps_heavy_hitters_and_recent_tokens(tiny_llm: LLM) -> None:
    """Against the slow scores of each layer's own queries and keys, the last layer's too."""
    seen: list[tuple[Tensor, Tensor]] = []
    score = H2O.score

    def watch(self: H2O, observed: Observation) -> Tensor:
        seen.append((observed.q.clone(), observed.k.clone()))
        return score(self, observed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(H2O, "score", watch)
        kept = tiny_llm.prefill(PROMPT, H2O(kv_len=40, recent_share=0.25)).kept
    assert [q.shape[2] for q, _ in seen] == [N_TOKENS] * 6
    for layer, (q, k) in enumerate(seen):
        heavy = slow_received(q, k)[0, :, : N_TOKENS - 10].topk(30).indices.sort().values
        expected = torch.cat((heavy, torch.arange(N_TOKENS - 10, N_TOKENS).expand(2, -1)), dim=1)
        assert torch.equal(kept[layer][0], expected)
    recent = tiny_llm.prefill(PROMPT, H2O(kv_len=40, recent_share=1.0)).kept
    assert all(entries[0, 0].tolist() == list(range(260, 300)) for entries in recent)


def test_pyramidinfer_sends_on_fewer_from_layer_to_layer(tiny_llm: LLM) -> None:
    policy = PyramidInfer(first_layer=1, decay=0.6, floor=0.2, min_tokens=8)
    pre = tiny_llm.prefill(PROMPT, policy)
    assert [tokens.shape[1] for tokens in pre.tokens] == [300, 300, 180, 108, 64, 60]
    assert [kept.shape[2] for kept in pre.kept] == [300, 180, 108, 64, 60, 60]
    assert PyramidInfer().stages(8, 100) == [Stage(range(8))]  # below the floor
    with pytest.raises(FastKVError, match="first_layer must be below"):
        PyramidInfer(first_layer=6).validate(6)
    for settings in ({"decay": 0}, {"floor": 1.5}, {"first_layer": -1}, {"window": 0}, {"min_tokens": 7}):
        with pytest.raises(FastKVError):
            PyramidInfer(**settings)


def test_recent_queries_weigh_more() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8)
    logits = q[:, :, -4:] @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    logits[..., -4:] = logits[..., -4:].masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    expected = (logits.softmax(-1) * weights).sum(2)[..., :-4].unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(recent_attention(q, k, 4), expected)


# --- policies of one's own ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Policy):
    """Without a window; the last token of all is worth least."""

    reduces: str = "stage"

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return n_tokens // 2

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        keep = n_tokens // 2 if self.reduces == "stage" else None
        return [Stage(range(2), keep), Stage(range(2, n_layers))]

    def first_pass(self, n_layers: int, n_tokens: int) -> FirstPass | None:
        return FirstPass(1, n_tokens // 2) if self.reduces == "first pass" else None

    def score(self, observed: Observation) -> Tensor:
        n_tokens = observed.k.shape[2]
        return -torch.arange(float(n_tokens)).expand(*observed.k.shape[:2], n_tokens)


@pytest.mark.parametrize("reduces", ["stage", "first pass"])
def test_the_last_token_is_propagated_without_a_window(tiny_llm: LLM, reduces: str) -> None:
    """It is the one whose logits are asked for; its own score may be the worst."""
    left = tiny_llm.prefill(PROMPT, Own(reduces=reduces), 0).tokens[-1][0]
    assert left.tolist() == [*range(N_TOKENS // 2 - 1), N_TOKENS - 1]


class ScoresOfAll(SnapKV):
    def score(self, observed: Observation) -> Tensor:
        return observed.k.float().norm(dim=-1)


class TooLittle(SnapKV):
    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return 4


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (ScoresOfAll(), r"policy scoresofall: score must give .*\[1, 2, 292\], of layer 0, not \[1, 2, 300\]"),
        (TooLittle(), r"policy toolittle: budget must be at least its window \(8\), not 4 \(layer 0, 300 tokens\)"),
    ],
)
def test_mistakes_of_ones_own_policy_are_one_line(tiny_llm: LLM, policy: Policy, said: str) -> None:
    """On a GPU an index beyond the end would take the whole process along."""
    with pytest.raises(FastKVError, match=said):
        tiny_llm.prefill(PROMPT, policy)
