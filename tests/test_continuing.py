"""A sequence that continues from its cache: in pieces, by several tokens a step, compressed again, and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import FullByHead, SlowTwin
from torch import Tensor

from fastkv import (
    ASL,
    H2O,
    LLM,
    AdaKV,
    FastKV,
    FastKVError,
    FullKV,
    GemFilter,
    PyramidInfer,
    PyramidKV,
    SamplingParams,
    SnapKV,
    StreamingLLM,
    StructKV,
)
from fastkv.cache.dense import DenseLayer
from fastkv.cache.per_head import PerHeadLayer
from fastkv.cache.policy import Observation, Policy

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
EVERY_POLICY = [
    FullKV(),
    FastKV(min_tokens=8),
    FastKV(tsp_layer=1, tsp_len=30, kv_len=60),
    SnapKV(min_tokens=8),
    PyramidKV(min_tokens=8),
    StreamingLLM(min_tokens=8),
    PyramidInfer(min_tokens=8),
    H2O(min_tokens=8),
    AdaKV(min_tokens=8),
    GemFilter(min_tokens=8),
    StructKV(min_tokens=8),
    ASL(min_tokens=8),
]
NAMES = [policy.name for policy in EVERY_POLICY]


def tokens(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


# --- the full cache: any pieces are the whole ---


@pytest.mark.parametrize("policy", [FullKV(), FullByHead()], ids=["dense", "per head"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pieces", [(100, 77), (1, 176), (150, 1, 1, 25), (40, 40, 40, 57)], ids=str)
def test_a_full_cache_in_pieces_is_one_prefill(
    tiny_llm: LLM, policy: FullKV, batch: int, pieces: tuple[int, ...]
) -> None:
    ids = tokens(177, batch)
    whole = tiny_llm.prefill(ids, policy, 4)
    first, *rest = ids.split(pieces, dim=1)
    pre = tiny_llm.prefill(first, policy, 4)
    for piece in rest:
        pre = tiny_llm.prefill(piece, policy, 4, cache=pre.cache)
    assert pre.cache.pool.layout is (policy.layout or DenseLayer)
    torch.testing.assert_close(pre.logits, whole.logits, **CLOSE)
    for layer in range(tiny_llm.config.n_layers):
        assert torch.equal(pre.kept[layer], whole.kept[layer])
        for found, expected in zip(pre.cache.read(layer), whole.cache.read(layer), strict=True):
            torch.testing.assert_close(found.k, expected.k, **CLOSE)
            torch.testing.assert_close(found.v, expected.v, **CLOSE)
    step = tokens(1, batch, seed=9)[:, 0]
    torch.testing.assert_close(tiny_llm.decode(pre.cache, step), tiny_llm.decode(whole.cache, step), **CLOSE)


def test_heads_of_different_lengths_keep_new_tokens_whole(tiny_llm: LLM) -> None:
    """Against attention computed anew from the entries that each head kept: a slow twin head by head."""
    policy = AdaKV(kv_len=40, head_floor=0.0)
    ids, more = tokens(200), tokens(30, seed=1)
    slow = SlowTwin(tiny_llm, tiny_llm.prefill(ids, policy, 4).cache, 200)
    pre = tiny_llm.prefill(ids, policy, 4)
    assert pre.cache.pool.layout.per_head
    before = pre.cache.count(0)
    again = tiny_llm.prefill(more, policy, 8, cache=pre.cache)
    assert again.cache.count(0) == before + 30
    torch.testing.assert_close(again.logits, slow.run(more)[:, -1], **CLOSE)
    step = tokens(1, seed=2)
    torch.testing.assert_close(tiny_llm.decode(again.cache, step), slow.run(step), **CLOSE)


FAMILIES: list[dict[str, Any]] = [
    {"architectures": ["LlamaForCausalLM"]},
    {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 6},
    {"architectures": ["MistralForCausalLM"], "sliding_window": 32},
    {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    {"architectures": ["Olmo2ForCausalLM"]},
    {"architectures": ["GraniteForCausalLM"], "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
]


@pytest.mark.parametrize("layout", [DenseLayer, PerHeadLayer], ids=["dense", "per head"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: "-".join(map(str, family.values())))
def test_every_family_goes_on(tmp_path: Path, family: dict[str, Any], layout: Any) -> None:
    """Sliding windows, too, though the pieces are longer or shorter than they are; then several tokens in one step."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **family}))
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    policy = FullKV() if layout is DenseLayer else FullByHead()
    ids, new = tokens(120, 2), tokens(5, 2, seed=1)
    whole = llm.prefill(ids, policy, 5)
    pre = llm.prefill(ids[:, :70], policy, 5)
    for piece in ids[:, 70:].split((7, 43), dim=1):
        pre = llm.prefill(piece, policy, 5, cache=pre.cache)
    torch.testing.assert_close(pre.logits, whole.logits, **CLOSE)
    slow = torch.stack([llm.decode(whole.cache, new[:, index]) for index in range(5)], dim=1)
    torch.testing.assert_close(llm.decode(pre.cache, new), slow, **CLOSE)


# --- several tokens a step ---


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=NAMES)
def test_a_step_of_several_tokens_is_as_many_steps(tiny_llm: LLM, policy: Policy) -> None:
    ids, new = tokens(200, 2), tokens(6, 2, seed=3)
    one, many = (tiny_llm.prefill(ids, policy, 6).cache for _ in range(2))
    slow = torch.stack([tiny_llm.decode(one, new[:, index]) for index in range(6)], dim=1)
    fast = torch.cat([tiny_llm.decode(many, part) for part in new.split((4, 1, 1), dim=1)], dim=1)
    assert fast.shape == (2, 6, 256)
    torch.testing.assert_close(fast, slow, **CLOSE)
    assert torch.equal(one.lengths, many.lengths)
    assert one.position == many.position == int(many.next_position[0])


def test_a_step_that_does_not_fit_changes_nothing(tiny_llm: LLM) -> None:
    cache = tiny_llm.prefill(tokens(50), FullKV(), 3).cache
    with pytest.raises(FastKVError, match="room for 3 more tokens, not 4"):
        tiny_llm.decode(cache, tokens(4))
    assert cache.position == 50
    assert tiny_llm.decode(cache, tokens(3)).shape == (1, 3, 256)


# --- compressed again ---


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=NAMES)
def test_going_on_equals_a_recomputation_from_the_kept_entries(tiny_llm: LLM, policy: Policy) -> None:
    """As many new tokens as the window, or one, are kept whole by every policy, and attend to all that there is."""
    ids, new = tokens(200), tokens(max(1, policy.window), seed=4)
    pre = tiny_llm.prefill(ids, policy, 0)
    slow = SlowTwin(tiny_llm, pre.cache, pre.cache.position)
    expected = slow.run(new)
    again = tiny_llm.prefill(new, policy, 2, cache=pre.cache)
    torch.testing.assert_close(again.logits, expected[:, -1], **CLOSE)
    step = tokens(1, seed=5)
    torch.testing.assert_close(tiny_llm.decode(again.cache, step), slow.run(step), **CLOSE)


@pytest.mark.parametrize("policy", [SnapKV(kv_len=60), FastKV(tsp_rate=1.0, kv_len=60)], ids=["snapkv", "fastkv"])
def test_a_second_prompt_is_chosen_with_what_was_kept(tiny_llm: LLM, policy: SnapKV) -> None:
    """A slow twin scores [kept ; new] with the new window, and keeps the best of both."""
    ids, new = tokens(200), tokens(90, seed=5)
    pre = tiny_llm.prefill(ids, policy, 4)
    slow = SlowTwin(tiny_llm, pre.cache, 200)
    earlier = [pre.cache.positions(layer).clone() for layer in range(6)]
    logits = slow.run(new)[:, -1]
    again = tiny_llm.prefill(new, policy, 4, cache=pre.cache)
    torch.testing.assert_close(again.logits, logits, **CLOSE)
    queries, window = window_queries(tiny_llm, slow, ids, new, policy), policy.window
    for layer in range(6):
        keys = torch.stack([k for k, _ in slow.entries[layer]])[None]
        values = torch.stack([v for _, v in slow.entries[layer]])[None]
        scores = policy.score(Observation(layer, queries[layer], keys, values, n_past=60))
        best = scores.topk(60 - window, dim=-1).indices.sort().values
        recent = torch.arange(150 - window, 150).expand(1, 2, -1)
        everything = torch.cat((earlier[layer], torch.arange(200, 290).expand(1, 2, -1)), dim=2)
        expected = everything.gather(2, torch.cat((best, recent), dim=2))
        assert torch.equal(again.kept[layer], expected)
        assert torch.equal(again.cache.positions(layer), expected)
        torch.testing.assert_close(
            again.cache.read(layer)[0].k,
            keys.gather(2, torch.cat((best, recent), dim=2)[..., None].expand(-1, -1, -1, keys.shape[-1])),
            **CLOSE,
        )
        assert (expected < 200).any(), "nothing of the first prompt is left"
        assert ((expected >= 200) & (expected < 290 - window)).any(), "nothing new but the window"


def window_queries(llm: LLM, slow: SlowTwin, ids: Tensor, new: Tensor, policy: SnapKV) -> list[Tensor]:
    """The window's queries of every layer, watched in a prefill that goes on."""
    seen: list[Tensor] = []
    real = type(policy).score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(policy), "score", lambda self, o: seen.append(o.q[:, :, -self.window :].clone()) or real(self, o)
        )
        cache = llm.prefill(ids, policy, 4).cache
        seen.clear()
        llm.prefill(new, policy, 4, cache=cache)
    return seen


@dataclass(frozen=True, kw_only=True)
class ByHead(SnapKV):
    """A method of one's own that inherits `compresses_again`."""

    per_head = True

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        return torch.tensor([count + 3, count - 3]).expand(scores.shape[:2])


class FirstPassAgain(GemFilter):
    compresses_again = True


@pytest.mark.parametrize("policy", [ByHead(kv_len=20), FirstPassAgain(kv_len=20)], ids=["per head", "first pass"])
def test_what_can_be_chosen_once_only_is_kept_whole_afterwards(tiny_llm: LLM, policy: Policy) -> None:
    ids, new = tokens(10), tokens(60, seed=1)
    cache = tiny_llm.prefill(ids, policy, 0).cache
    found = tiny_llm.prefill(new, policy, 0, cache=cache)
    torch.testing.assert_close(found.logits, tiny_llm.prefill(torch.cat((ids, new), 1), FullKV()).logits, **CLOSE)
    assert (cache.position, cache.count(0)) == (70, 70)


def test_tsp_works_on_the_new_tokens(tiny_llm: LLM) -> None:
    policy = FastKV(tsp_layer=2, tsp_rate=0.3, kv_len=40, min_tokens=8)
    pre = tiny_llm.prefill(tokens(200), policy, 4)
    again = tiny_llm.prefill(tokens(100, seed=6), policy, 4, cache=pre.cache)
    assert [seen.shape[1] for seen in again.tokens] == [100] * 3 + [30] * 3
    assert all((seen >= 200).all() for seen in again.tokens)
    assert [kept.shape[2] for kept in again.kept] == [40] * 6
    assert again.cache.position == 300


def test_budgets_count_from_the_whole_sequence(tiny_llm: LLM) -> None:
    policy = SnapKV(kv_retention=0.2, min_tokens=8)
    pre = tiny_llm.prefill(tokens(200), policy, 4)
    assert pre.cache.count(0) == 40
    again = tiny_llm.prefill(tokens(100, seed=6), policy, 4, cache=pre.cache)
    assert again.cache.count(0) == 60


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=NAMES)
def test_many_turns_with_answers_between(tiny_llm: LLM, policy: Policy) -> None:
    """Prompt, answer, prompt, answer: counts, positions and memory stay true, however often the cache has to grow."""
    pre = tiny_llm.prefill(tokens(150), policy, 3)
    position = pre.cache.position
    for turn in range(1, 5):
        tiny_llm.decode(pre.cache, tokens(3, seed=turn))
        pre = tiny_llm.prefill(tokens(40 * turn, seed=turn), policy, 3, cache=pre.cache)
        position += 3 + 40 * turn
        assert pre.cache.position == position == int(pre.cache.next_position[0])
        assert pre.logits.isfinite().all()
        for layer in range(6):
            kept = pre.cache.positions(layer)
            of_head = [(row >= 0).sum() for row in kept[0]]
            assert [int(count) for count in pre.cache.lengths[layer, 0]] == [int(count) for count in of_head]
            assert kept.max() < position
            memory = [*pre.cache.pool.layers[layer].padded(pre.cache.slots, pre.cache.pool.capacities[layer])]
            assert all(buffer.isfinite().all() for buffer in memory)


# --- back ---


@pytest.mark.parametrize("policy", EVERY_POLICY, ids=NAMES)
def test_a_rewind_is_never_having_had_the_tokens(tiny_llm: LLM, policy: Policy) -> None:
    ids, other = tokens(200, 2), tokens(4, 2, seed=7)
    cache = tiny_llm.prefill(ids, policy, 12).cache
    tiny_llm.decode(cache, tokens(3, 2, seed=8))
    kept = [cache.positions(layer) for layer in range(6)]
    tiny_llm.decode(cache, tokens(5, 2, seed=9))
    cache.truncate(5)
    assert all(torch.equal(cache.positions(layer), kept[layer]) for layer in range(6))
    assert cache.room == 9
    found = tiny_llm.decode(cache, other)
    fresh = tiny_llm.prefill(ids, policy, 12).cache
    tiny_llm.decode(fresh, tokens(3, 2, seed=8))
    torch.testing.assert_close(found, tiny_llm.decode(fresh, other), **CLOSE)


def test_a_full_cache_goes_back_into_its_prompt(tiny_llm: LLM) -> None:
    ids = tokens(100)
    cache = tiny_llm.prefill(ids, FullKV(), 4).cache
    tiny_llm.decode(cache, tokens(2))
    cache.truncate(52)
    found = tiny_llm.prefill(tokens(30, seed=3), FullKV(), 4, cache=cache).logits
    expected = tiny_llm.prefill(torch.cat((ids[:, :50], tokens(30, seed=3)), dim=1), FullKV()).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("policy", [FullKV(), FullByHead()], ids=["dense", "per head"])
def test_an_emptied_cache_is_as_good_as_a_new_one(tiny_llm: LLM, policy: FullKV) -> None:
    """The room of the sequence that it held before says nothing about where the heads of the next one begin."""
    ids = tokens(100, seed=3)
    expected = tiny_llm.prefill(ids, policy, 20)
    cache = tiny_llm.prefill(tokens(100), policy, 20).cache
    cache.truncate(100)
    found = tiny_llm.prefill(ids, policy, 20, cache=cache)
    assert cache.room == 20
    new = tokens(20, seed=4)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(tiny_llm.decode(cache, new), tiny_llm.decode(expected.cache, new), **CLOSE)


def test_what_was_compressed_cannot_be_rewound(tiny_llm: LLM) -> None:
    cache = tiny_llm.prefill(tokens(200), FastKV(min_tokens=8), 4).cache
    tiny_llm.decode(cache, tokens(2))
    with pytest.raises(FastKVError, match="can forget its last 2 tokens, not 3"):
        cache.truncate(3)
    for wrong in (-1, 1.5, True, None, torch.tensor(1)):
        with pytest.raises(FastKVError, match="count must be a whole number of at least 0, not "):
            cache.truncate(wrong)  # type: ignore[arg-type]
    cache.truncate(2)
    assert cache.position == 200


@pytest.mark.parametrize("policy", [FullKV(), FullByHead()], ids=["dense", "per head"])
def test_memory_made_in_inference_mode_is_written_outside_of_it(tiny_folder: Path, policy: FullKV) -> None:
    llm = LLM(tiny_folder, dtype="float32", device="cpu")
    params = SamplingParams(max_tokens=2)
    with torch.inference_mode():
        cache = llm.prefill(tokens(40), policy, 4).cache
        llm.prefill(tokens(40), policy, 4, cache=cache)
        expected = llm.generate([5, 6, 7], params, policy).token_ids
    cache.truncate(3)
    llm.prefill(tokens(40), policy, 4, cache=cache)
    assert cache.position == 117
    assert llm.generate([5, 6, 7], params, policy).token_ids == expected


def test_another_instance_of_the_model_continues(tiny_llm: LLM, tiny_folder: Path) -> None:
    """Its rotary tables have not seen the prefill."""
    new = tokens(2, seed=1)
    one, other = (tiny_llm.prefill(tokens(40), FullKV(), 2).cache for _ in range(2))
    found = LLM(tiny_folder, dtype="float32", device="cpu").decode(other, new)
    torch.testing.assert_close(found, tiny_llm.decode(one, new), **CLOSE)


def test_a_sliding_window_limits_only_what_is_dropped(tmp_path: Path) -> None:
    """AdaKV never chooses again, and keeps new tokens whole: the window is no limit then, but it is SnapKV's."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 40,
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, dtype="float32", device="cpu", load_format="dummy")
    ids, new = tokens(30), tokens(60, seed=1)
    whole = llm.prefill(torch.cat((ids, new), dim=1), FullKV())
    cache = llm.prefill(ids, FullKV()).cache
    with pytest.raises(FastKVError, match="sliding_window of 40, where policy snapkv cannot drop tokens"):
        llm.prefill(new, SnapKV(min_tokens=8), cache=cache)
    torch.testing.assert_close(llm.prefill(new, AdaKV(min_tokens=8), cache=cache).logits, whole.logits, **CLOSE)


# --- mistakes ---


def test_mistakes_are_one_line(tiny_llm: LLM, archive_llm: LLM) -> None:
    cache = tiny_llm.prefill(tokens(20, 2), FullKV(), 4).cache
    with pytest.raises(FastKVError, match="holds 2 sequences, but the new tokens are of 1"):
        tiny_llm.prefill(tokens(5), FullKV(), cache=cache)
    with pytest.raises(FastKVError, match="prefill takes token ids, not text"):
        tiny_llm.prefill("text")  # type: ignore[arg-type]
    with pytest.raises(FastKVError, match="of another model"):
        archive_llm.prefill([20, 21], FullKV(), cache=cache)
    with pytest.raises(FastKVError, match="a cache is what a prefill has left"):
        tiny_llm.prefill(tokens(5), FullKV(), cache="no cache")  # type: ignore[arg-type]
    with pytest.raises(FastKVError, match="one token id or several for each of 2"):
        tiny_llm.decode(cache, tokens(1, 3))
    context = tiny_llm.config.context_length
    with pytest.raises(FastKVError, match=f"tokens after the 20 before them, but the model's context .* is {context}"):
        tiny_llm.prefill(tokens(context - 10, 2), FullKV(), cache=cache)


def test_a_cache_that_cannot_grow_is_what_it_was(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, twin = (tiny_llm.prefill(tokens(50), FullKV(), 4).cache for _ in range(2))
    real, calls = DenseLayer.state, iter(range(6))

    def state(self: DenseLayer, slot: int) -> dict[str, Tensor]:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(self, slot)

    with monkeypatch.context() as patched:
        patched.setattr(DenseLayer, "state", state)
        with pytest.raises(FastKVError, match="out of memory"):
            tiny_llm.prefill(tokens(100), FullKV(), cache=cache)
    torch.testing.assert_close(tiny_llm.decode(cache, tokens(2)), tiny_llm.decode(twin, tokens(2)))


def test_a_prefill_that_fails_leaves_a_cache_that_says_so(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tiny_llm.prefill(tokens(50), FullKV(), 4).cache

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fastkv.engine.projection.Projection.finish_", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny_llm.prefill(tokens(10), FullKV(), cache=cache)
    for work in (lambda: tiny_llm.decode(cache, tokens(1)), lambda: tiny_llm.prefill(tokens(1), cache=cache)):
        with pytest.raises(FastKVError, match="left by a prefill that failed"):
            work()
