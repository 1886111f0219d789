"""Decoding: against a recomputation from scratch, and against plain attention over the kept entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FastKVError, FullKV
from fastkv.cache.dense import DenseLayer
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.layer import EntryShape, Part
from fastkv.cache.policy import Policy
from fastkv.cache.pool import KVPool
from fastkv.engine import attention, decode_attention
from fastkv.engine.decode import decode_step, run_layers
from fastkv.engine.decode_attention import EagerAttention
from fastkv.engine.plan import plan_request
from fastkv.engine.prefill import prefill
from fastkv.engine.step import runs_of
from fastkv.engine.workspace import Workspace

POLICY = FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.1, min_tokens=8)
PROMPT = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))


def test_full_cache_decoding_is_a_longer_prefill(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, FullKV())
    ids = PROMPT[0].tolist()
    for token in (17, 4, 250, 99):
        logits = tiny_llm.decode(pre.cache, torch.tensor([token]))
        ids.append(token)
        torch.testing.assert_close(logits, tiny_llm.prefill(ids, FullKV()).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoding_attends_to_the_kept_entries_at_the_true_position(tiny_llm: LLM) -> None:
    """The slow twin keeps K/V as growing lists and rotates by the positions N, N + 1, … of the prompt."""
    model = tiny_llm._model
    pre = tiny_llm.prefill(PROMPT, POLICY)
    parts = [pre.cache.read(layer)[0] for layer in range(6)]
    assert [part.k.shape for part in parts] == [(1, 2, 20, 16)] * 6
    entries = [(part.k.clone(), part.v.clone()) for part in parts]
    for step, token in enumerate((17, 4, 250, 99)):
        hidden = model.embed(torch.tensor([[token]]))
        rope = model.rope(torch.tensor([[200 + step]]))
        for layer, block in enumerate(model.blocks):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                keys, values = (torch.cat(pair, 2) for pair in zip(entries[layer], (k, v), strict=True))
                entries[layer] = (keys, values)
                weights = q @ keys.repeat_interleave(2, 1).transpose(2, 3) / q.shape[-1] ** 0.5
                return weights.softmax(-1) @ values.repeat_interleave(2, 1)

            hidden = block.mlp(block.attention(hidden, rope, attend))
        expected = model.head(hidden[:, -1])
        torch.testing.assert_close(tiny_llm.decode(pre.cache, torch.tensor([token])), expected, atol=1e-4, rtol=1e-4)


def test_a_batch_decodes_as_each_prompt_alone(tiny_llm: LLM) -> None:
    ids = torch.randint(3, 256, (3, 150), generator=torch.Generator().manual_seed(2))
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    together = tiny_llm.prefill(ids, POLICY)
    steps = [tiny_llm.decode(together.cache, step) for step in tokens]
    for index in range(3):
        alone = tiny_llm.prefill(ids[index : index + 1], POLICY)
        for step, logits in zip(tokens, steps, strict=True):
            torch.testing.assert_close(logits[index], tiny_llm.decode(alone.cache, step[index : index + 1])[0])


def pool_of(llm: LLM, lengths: list[int | None], policy: Policy) -> tuple[KVPool, dict[int, KVCache]]:
    """Caches for prompts of these lengths, by slot, in a pool that was used before; None leaves a slot free."""
    model = llm._model
    pool = KVPool(DenseLayer, [192] * 6, len(lengths), EntryShape(2, 16, torch.float32), model.device)
    overflowed = torch.full((len(lengths), 2, 180, 16), float("inf"))
    for storage in pool.layers:
        storage.store(range(len(lengths)), overflowed, overflowed, None, 8)
    pool.release(pool.take_all())
    made = {}
    for slot, length in enumerate(lengths):
        if length is not None:
            ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(length))
            plan = plan_request(llm.config, policy, length, 8, torch.float32, 1000)
            made[slot] = plan.cache_in(pool, range(slot, slot + 1))
            prefill(model, ids, plan, made[slot], Workspace())
    return pool, made


TOGETHER: list[tuple[list[int | None], list[range], list[int]]] = [
    # lengths; runs of neighbours; in how many calls each run is attended to
    ([150, 150, 150], [range(3)], [1]),
    ([150, 145, 155], [range(3)], [1]),
    ([150, 20, 160], [range(3)], [3]),  # too different
    ([150, None, 149, 150], [range(1), range(2, 4)], [1, 1]),
    ([80, 100], [range(2)], [1]),
]


@pytest.mark.parametrize(("lengths", "runs", "calls"), TOGETHER)
@pytest.mark.parametrize("policy", [FullKV(), FastKV(kv_retention=1.0, tsp_rate=0.99, min_tokens=8)])
@torch.inference_mode()
def test_neighbours_are_attended_to_together(
    tiny_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    policy: Policy,
    lengths: list[int | None],
    runs: list[range],
    calls: list[int],
) -> None:
    """The slow twin takes each cache on its own."""
    model = tiny_llm._model
    pool, made = pool_of(tiny_llm, lengths, policy)
    _, alone = pool_of(tiny_llm, lengths, policy)
    assert runs_of(sorted(made)) == runs
    counted: list[int] = []
    attend = decode_attention.attend_parts

    def count(parts: Sequence[Part], *rest: Any, **named: Any) -> Tensor:
        counted.append(len(parts))
        return attend(parts, *rest, **named)

    slots = torch.tensor(list(made))
    for step in range(3):
        tokens = torch.arange(len(made))[:, None] + 7 + step
        with monkeypatch.context() as patched:
            patched.setattr(decode_attention, "attend_parts", count)
            together = EagerAttention(pool, runs, 1, model.config.windows)
            logits = run_layers(model, tokens, pool.next_position[slots].unsqueeze(1), together)
        assert counted == calls * 6
        counted.clear()
        for index, slot in enumerate(made):
            made[slot].advance()
            one = decode_step(model, alone[slot], tokens[index : index + 1])
            torch.testing.assert_close(logits[index : index + 1], one, atol=1e-5, rtol=1e-5)


def test_runs_are_neighbours() -> None:
    assert runs_of([]) == []
    assert runs_of([3]) == [range(3, 4)]
    assert runs_of([0, 1, 3, 4, 5, 7]) == [range(2), range(3, 6), range(7, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("hidden", [0, 20])
def test_attention_of_one_query_is_grouped_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, group: int, hidden: int
) -> None:
    """Whatever is hidden, and whether a single query is given once or, where that is faster, twice."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((2 * group, 1), (2, 50), (2, 50)))
    live = 50 - hidden
    slow = torch.nn.functional.scaled_dot_product_attention(
        q.float(), *(kept[:, :, :live].float().repeat_interleave(group, 1) for kept in (k, v))
    )
    visible = torch.arange(50).expand(2, 1, 1, -1) < live if hidden else None
    rows: list[int] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, *others, **more: rows.append(q.shape[2]) or attend(q, *others, **more),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        attention.decode_attention(q, k, v, visible).float(), slow, atol=tolerance, rtol=tolerance
    )
    assert rows == [2 if group == 1 and dtype != torch.float32 else group]


def test_the_context_is_the_limit(tiny_llm: LLM) -> None:
    limit = tiny_llm.config.context_length
    pre = tiny_llm.prefill([7] * (limit - 1), FastKV(), max_tokens=5)
    tiny_llm.decode(pre.cache, torch.tensor([3]))
    with pytest.raises(FastKVError, match=str(limit)):
        tiny_llm.decode(pre.cache, torch.tensor([3]))


@pytest.mark.parametrize(
    "tokens",
    [[1, 2], [], [[]], [[[1]]], [[1], [2]], [256], [-1], [[1, 256]], [1.0], [True], "a", None, [[1], [2, 3]], 7],
)
def test_wrong_tokens_are_refused(tiny_llm: LLM, tokens: Any) -> None:
    pre = tiny_llm.prefill([5, 6, 7])
    with pytest.raises(FastKVError):
        tiny_llm.decode(pre.cache, tokens)
    assert (pre.cache.position, pre.cache.count(0), int(pre.cache.next_position)) == (3, 3, 3)


def test_a_cache_must_be_one_of_this_model(tiny_llm: LLM, archive_llm: LLM) -> None:
    pre = archive_llm.prefill([5, 6, 7])
    with pytest.raises(FastKVError, match="another model"):
        tiny_llm.decode(pre.cache, torch.tensor([5]))
    with pytest.raises(FastKVError, match=r"pre\.cache"):
        archive_llm.decode(pre, torch.tensor([5]))  # type: ignore[arg-type]
