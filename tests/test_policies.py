"""Every policy keeps the same promises; then what each of them is about."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FastKVError, FullKV, PyramidKV, SamplingParams, SnapKV, StreamingLLM
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policies import POLICIES
from fastkv.cache.policy import Policy, plan_layers

N_TOKENS = 300
PROMPT = torch.randint(3, 256, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
COMPRESSING = [name for name in POLICIES if name != "full"]


def small(name: str, **settings: Any) -> Policy:
    """The policy at a budget of 40 of the 300 tokens."""
    if name != "full":
        settings = {"kv_len": 40, **settings}
    return POLICIES[name](**settings)


def unbounded(name: str) -> Policy:
    """Budgets of the whole prompt and more."""
    known = {field.name for field in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]
    return POLICIES[name](**{setting: 999 for setting in ("kv_len", "tsp_len") if setting in known})


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_of_the_whole_prompt_is_the_full_cache(tiny_llm: LLM, name: str) -> None:
    full, same = tiny_llm.prefill(PROMPT, FullKV()), tiny_llm.prefill(PROMPT, unbounded(name))
    assert torch.equal(full.logits, same.logits)
    for theirs, ours in zip(
        (full.kept, full.cache.k, full.cache.v), (same.kept, same.cache.k, same.cache.v), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_counts_and_bytes_are_as_promised(tiny_llm: LLM, name: str, batch: int) -> None:
    policy, config = small(name), tiny_llm.config
    ids = torch.randint(3, 256, (batch, N_TOKENS), generator=torch.Generator().manual_seed(2))
    pre = tiny_llm.prefill(ids, policy, max_tokens=10)
    plans = plan_layers(policy, config.n_layers, N_TOKENS)
    for plan, tokens, kept in zip(plans, pre.tokens, pre.kept, strict=True):
        assert tokens.shape == (batch, plan.seen)
        assert kept.shape == (batch, config.n_kv_heads, plan.kept)
    mean = sum(plan.kept for plan in plans) / len(plans)
    assert mean == (N_TOKENS if name == "full" else 40)
    values = KVCache.size_of([plan.kept for plan in plans], 10, config.n_kv_heads, config.head_dim)
    assert pre.cache.nbytes == batch * values * 4
    assert pre.cache.lengths.tolist() == [[plan.kept] * batch for plan in plans]


@pytest.mark.parametrize("name", POLICIES)
def test_kept_positions_ascend_are_unique_and_were_seen(tiny_llm: LLM, name: str) -> None:
    policy = small(name)
    pre = tiny_llm.prefill(PROMPT, policy)
    for tokens, kept in zip(pre.tokens, pre.kept, strict=True):
        assert kept.dtype == torch.int64
        assert (kept.diff(dim=-1) > 0).all()
        assert 0 <= int(kept.min()) <= int(kept.max()) == N_TOKENS - 1
        assert set(kept.flatten().tolist()) <= set(tokens.flatten().tolist())
        assert (kept[..., -policy.window :] >= N_TOKENS - policy.window).all() or policy.window == 0


@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_decoding_is_attention_over_the_kept_entries(tiny_llm: LLM, name: str) -> None:
    """The slow twin gathers each layer's kept K/V out of a full prefill of what the layer saw."""
    model, policy = tiny_llm._model, small(name)
    pre = tiny_llm.prefill(PROMPT, policy)
    entries = [
        (pre.cache.k[i][:, :, : kept.shape[2]].clone(), pre.cache.v[i][:, :, : kept.shape[2]].clone())
        for i, kept in enumerate(pre.kept)
    ]
    if pre.tokens[-1].shape[1] == N_TOKENS:  # no context reduction: the entries are those of a full cache
        full = tiny_llm.prefill(PROMPT, FullKV())
        for layer, kept in enumerate(pre.kept):
            rows = kept.unsqueeze(-1).expand(-1, -1, -1, model.config.head_dim)
            expected = full.cache.k[layer][:, :, :N_TOKENS].gather(2, rows)
            torch.testing.assert_close(entries[layer][0], expected, atol=1e-5, rtol=1e-5)
    for step, token in enumerate((17, 4, 250)):
        hidden = model.embed(torch.tensor([[token]]))
        rope = model.rope(torch.tensor([[N_TOKENS + step]]))
        for layer, block in enumerate(model.blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                entries[layer] = tuple(torch.cat(pair, 2) for pair in zip(entries[layer], (k, v), strict=True))  # type: ignore[assignment]
                keys, values = (entry.repeat_interleave(2, 1) for entry in entries[layer])
                return (q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ values

            hidden = block.mlp(block.attention(hidden, rope, attend))
        expected = model.head(hidden[:, -1])
        torch.testing.assert_close(tiny_llm.decode(pre.cache, torch.tensor([token])), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_in_a_batch_each_is_as_alone(tiny_llm: LLM, name: str) -> None:
    prompts = [PROMPT[0, :count].tolist() for count in (300, 41, 200, 9)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    alone = [tiny_llm.generate(prompt, params, small(name)).token_ids for prompt in prompts]
    together = tiny_llm.generate(prompts, params, small(name), batch_size=3)
    assert [output.token_ids for output in together] == alone


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_family(tmp_path: Path, name: str, family: str) -> None:
    config = {
        "architectures": [family],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        **FAMILIES[family],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    out = llm.generate([n % 64 for n in range(200)], SamplingParams(max_tokens=5, ignore_eos=True), small(name))
    assert len(out.token_ids) == 5
    assert out.metrics.kv_tokens == (200 if name == "full" else 40)


@pytest.mark.parametrize("name", COMPRESSING)
def test_settings_out_of_range_are_refused(name: str) -> None:
    for settings in ({"kv_retention": 0}, {"kv_retention": 1.1}, {"kv_len": 0}, {"min_tokens": 0}, {"kv_len": 1.5}):
        with pytest.raises(FastKVError) as caught:
            POLICIES[name](**settings)
        assert caught.value.setting == next(iter(settings))


@pytest.mark.parametrize("name", POLICIES)
def test_settings_are_told_by_name(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(POLICIES[name])}  # type: ignore[arg-type]
    assert set(POLICIES[name]().settings(8)) == fields


# --- what each of them is about ---


@pytest.mark.parametrize("settings", [{}, {"kv_retention": 0.2, "pooling": "avg"}, {"kv_len": 50, "window": 16}])
def test_snapkv_is_fastkv_without_tsp(tiny_llm: LLM, settings: dict[str, Any]) -> None:
    settings = {"min_tokens": 16, **settings}
    ours = tiny_llm.prefill(PROMPT, SnapKV(**settings))
    other = tiny_llm.prefill(PROMPT, FastKV(tsp_rate=1.0, **settings))
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
