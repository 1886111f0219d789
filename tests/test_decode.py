"""Decoding: against a recomputation from scratch, and against plain attention over the kept entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FastKVError, FullKV
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy
from fastkv.cache.storage import KVStorage
from fastkv.engine import decode
from fastkv.engine.attention import decode_attention
from fastkv.engine.prefill import new_cache, prefill
from fastkv.engine.workspace import Workspace

POLICY = FastKV(tsp_layer=2, tsp_rate=0.3, kv_retention=0.1, min_tokens=8)
PROMPT = torch.randint(3, 256, (1, 200), generator=torch.Generator().manual_seed(1))


def test_full_cache_decoding_is_a_longer_prefill(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, FullKV())
    text = PROMPT[0].tolist()
    for token in (17, 4, 250, 99):
        logits = tiny_llm.decode(pre.cache, torch.tensor([token]))
        text.append(token)
        torch.testing.assert_close(logits, tiny_llm.prefill(text, FullKV()).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_decoding_attends_to_the_kept_entries_at_the_true_position(tiny_llm: LLM) -> None:
    """The slow twin keeps K/V as growing lists and rotates by the position N, N + 1, … of the text."""
    model = tiny_llm._model
    pre = tiny_llm.prefill(PROMPT, POLICY)
    entries = [(pre.cache.k[i][:, :, :20].clone(), pre.cache.v[i][:, :, :20].clone()) for i in range(6)]
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
    for row in range(3):
        alone = tiny_llm.prefill(ids[row : row + 1], POLICY)
        for step, logits in zip(tokens, steps, strict=True):
            torch.testing.assert_close(logits[row], tiny_llm.decode(alone.cache, step[row : row + 1])[0])


def caches_of(llm: LLM, lengths: list[int | None], policy: Policy) -> list[KVCache]:
    """Caches for prompts of these lengths, in rows of one storage that was used before; None leaves a row empty."""
    model = llm._model
    storage = KVStorage.allocate([192] * 6, len(lengths), 2, 16, dtype=torch.float32, device=torch.device("cpu"))
    for buffer in [*storage.k, *storage.v]:
        buffer.fill_(float("nan"))
    made = []
    for row, length in enumerate(lengths):
        if length is not None:
            ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(length))
            cache = new_cache(model, policy, ids, 8, 1000, storage.rows(row, row + 1))
            prefill(model, ids, policy, cache, Workspace())
            made.append(cache)
    return made


TOGETHER: list[tuple[list[int | None], int, list[list[int]]]] = [
    ([150, 150, 150], 6, [[0, 1, 2]]),  # lengths; how many layers are attended to in one call; neighbours
    ([150, 145, 155], 6, [[0, 1, 2]]),
    ([150, 20, 160], 0, [[0, 1, 2]]),  # too different
    ([150, None, 149, 150], 6, [[0], [1, 2]]),
    ([80, 100], 0, [[0, 1]]),  # the shorter one has 96 slots, and what lies behind them was not cleared
]


@pytest.mark.parametrize(("lengths", "calls", "expected"), TOGETHER)
@pytest.mark.parametrize("policy", [FullKV(), FastKV(kv_retention=1.0, tsp_rate=0.99, min_tokens=8)])
def test_rows_that_lie_side_by_side_are_attended_to_together(
    tiny_llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    policy: Policy,
    lengths: list[int | None],
    calls: int,
    expected: list[list[int]],
) -> None:
    """The slow twin takes each cache on its own."""
    made = caches_of(tiny_llm, lengths, policy)
    assert [[made.index(cache) for cache in run] for run in decode.neighbours(made)] == expected
    alone = caches_of(tiny_llm, lengths, policy)
    counted = []
    together = decode._attend_together
    monkeypatch.setattr(
        decode, "_attend_together", lambda layer, *rest: counted.append(layer) or together(layer, *rest)
    )
    for step in range(3):
        tokens = torch.arange(len(made)) + 7 + step
        logits = decode.decode_step(tiny_llm._model, made, tokens)
        assert counted == list(range(calls))
        counted.clear()
        for index, cache in enumerate(alone):
            one = decode.decode_step(tiny_llm._model, [cache], tokens[index : index + 1])
            torch.testing.assert_close(logits[index : index + 1], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("hidden", [0, 20])
def test_decode_attention_is_grouped_attention(
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
    torch.testing.assert_close(decode_attention(q, k, v, visible).float(), slow, atol=tolerance, rtol=tolerance)
    assert rows == [2 if group == 1 and dtype != torch.float32 else group]


def test_the_context_is_the_limit(tiny_llm: LLM) -> None:
    limit = tiny_llm.config.context_length
    pre = tiny_llm.prefill([7] * (limit - 1), FastKV(), max_tokens=5)
    tiny_llm.decode(pre.cache, torch.tensor([3]))
    with pytest.raises(FastKVError, match=str(limit)):
        tiny_llm.decode(pre.cache, torch.tensor([3]))


@pytest.mark.parametrize("tokens", [[1, 2], [], [[1]], [256], [-1], [1.0], [True], "a", None, [[1], [2, 3]], 7])
def test_wrong_tokens_are_refused(tiny_llm: LLM, tokens: Any) -> None:
    pre = tiny_llm.prefill([5, 6, 7])
    with pytest.raises(FastKVError):
        tiny_llm.decode(pre.cache, tokens)
    assert pre.cache.appended == 0


def test_a_cache_must_be_one_of_this_model(tiny_llm: LLM, archive_llm: LLM) -> None:
    pre = archive_llm.prefill([5, 6, 7])
    with pytest.raises(FastKVError, match="another model"):
        tiny_llm.decode(pre.cache, torch.tensor([5]))
    with pytest.raises(FastKVError, match=r"pre\.cache"):
        archive_llm.decode(pre, torch.tensor([5]))  # type: ignore[arg-type]
