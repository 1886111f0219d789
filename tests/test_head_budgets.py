"""AdaKV and HeadKV: which head of a layer gets how much of its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkv import LLM, AdaKV, FastKVError, HeadKV, SamplingParams, SnapKV
from fastkv.cache.head_table import read_table, share_out

PROMPT = torch.randint(3, 256, (1, 300), generator=torch.Generator().manual_seed(1))
TABLE = [[0.0, 1.0], [0.5, 0.5], [0.0, 0.0], [0.2, 0.7], [3.0, 0.1], [0.0, 0.4]]


# --- AdaKV ---


def test_all_heads_compete_for_what_is_beyond_the_floor() -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6, 5], [4, 3, 2, 1, 0]]])
    policy = AdaKV(kv_len=3, window=1, kernel=1, min_tokens=1, head_floor=0)
    assert policy.head_budgets(0, 1, 3, scores).tolist() == [[5, 1]]  # four entries before the window, all of head 0
    halves = AdaKV(kv_len=3, window=1, kernel=1, min_tokens=1, head_floor=0.5)
    assert halves.head_budgets(0, 1, 3, scores).tolist() == [[4, 2]]


def test_adakv_with_nothing_to_compete_for_is_snapkv(tiny_llm: LLM) -> None:
    even = tiny_llm.prefill(PROMPT, SnapKV(kv_len=40, pooling="avg"))
    ours = tiny_llm.prefill(PROMPT, AdaKV(kv_len=40, pooling="avg", head_floor=1.0))
    assert all(torch.equal(a, b) for a, b in zip(even.kept, ours.kept, strict=True))


def test_adakv_keeps_the_best_of_the_layer_and_no_more_memory(tiny_llm: LLM) -> None:
    seen: list[torch.Tensor] = []
    score = AdaKV.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdaKV, "score", lambda self, observed: seen.append(score(self, observed)) or seen[-1])
        pre = tiny_llm.prefill(PROMPT, AdaKV(kv_len=40, head_floor=0))
    lengths = set()
    for scores, kept in zip(seen, pre.kept, strict=True):
        before_window = [of_head[(of_head >= 0) & (of_head < 292)] for of_head in kept[0]]
        found = torch.cat([of_head[chosen] for of_head, chosen in zip(scores[0], before_window, strict=True)])
        best = scores.flatten().topk(64).values  # ties may fall either way, values may not
        torch.testing.assert_close(found.sort().values, best.sort().values)
        lengths |= {len(chosen) for chosen in before_window}
    assert len(lengths) > 2, "no head has more than another"
    assert pre.cache.nbytes == tiny_llm.prefill(PROMPT, SnapKV(kv_len=40)).cache.nbytes
    assert pre.cache.pool.nbytes == pre.cache.nbytes


# --- HeadKV ---


@pytest.mark.parametrize("beta", [1.0, 1.35, 2.0, 100.0])
@pytest.mark.parametrize(("mean", "most"), [(32, 292), (1, 292), (100, 120), (119, 120), (0, 50)])
def test_budgets_add_up_and_fit(beta: float, mean: int, most: int) -> None:
    budgets = share_out(read_table(TABLE), beta, mean, most)
    assert sum(map(sum, budgets)) == mean * 12
    assert all(0 <= budget <= most for layer in budgets for budget in layer)
    assert all(sum(layer) % 2 == 0 for layer in budgets)


def test_budgets_follow_the_table() -> None:
    assert share_out(((1.0, 3.0), (0.0, 0.0)), 2.0, 100, 1000) == ((100, 200), (50, 50))
    assert share_out(((1.0, 3.0), (0.0, 0.0)), 1.0, 100, 1000) == ((100, 300), (0, 0))
    # What does not fit into a head goes to the others: in proportion first, and alike where the table is silent.
    assert share_out(((1.0, 3.0), (0.0, 0.0)), 1.0, 100, 220) == ((180, 220), (0, 0))
    assert share_out(((0.0, 3.0), (0.0, 0.0)), 1.0, 100, 190) == ((70, 190), (70, 70))
    assert share_out(((1.0, 3.0), (0.0, 0.0)), 2.0, 100, 100) == ((100, 100), (100, 100))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([1e308, 1e308, 0.0], (120, 120, 60)), ([1.0, 5e-324], (120, 80))],
)
def test_scores_of_any_size_are_shared_out(scores: list[float], expected: tuple[int, ...]) -> None:
    """Neither does their sum overflow, nor is a share of the pool too small to be given."""
    assert share_out(read_table([scores]), 1.35, 100, 120) == (expected,)


def test_headkv_keeps_what_the_table_gives(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(PROMPT, HeadKV(kv_len=40, head_scores=TABLE))
    found = [(kept >= 0).sum(dim=2)[0].tolist() for kept in pre.kept]
    expected = share_out(read_table(TABLE), 1.35, 32, 292)
    assert found == [[8 + budget for budget in layer] for layer in expected]
    assert max(map(max, found)) > 5 * min(map(min, found))
    alike = tiny_llm.prefill(PROMPT, HeadKV(kv_len=40, pooling="avg", head_scores=[[1, 1]] * 6))
    even = tiny_llm.prefill(PROMPT, SnapKV(kv_len=40, pooling="avg"))
    assert all(torch.equal(a, b) for a, b in zip(even.kept, alike.kept, strict=True))


def test_a_table_may_be_a_file(tmp_path: Path, tiny_llm: LLM) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"kind": "fastkv-head-scores", "scores": TABLE}))
    policy = HeadKV(kv_len=40, head_scores=path)
    assert policy == HeadKV(kv_len=40, head_scores=TABLE) == HeadKV(kv_len=40, head_scores=str(path))
    assert len({policy, HeadKV(kv_len=40, head_scores=TABLE)}) == 1
    out = tiny_llm.generate(PROMPT[0].tolist(), SamplingParams(max_tokens=3, ignore_eos=True), policy)
    assert out.metrics.kv_tokens == 40
    json.dumps(policy.settings(6))


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (None, "fastkv-eval head-scores"),
        ("no/such/file.json", "cannot be read"),
        ([], "a list for each layer"),
        ([1, 2], "a list for each layer"),
        ([[1.0], []], "a list for each layer"),
        ([[1.0], [1.0, 2.0]], "differ in their number"),
        ([[1.0, -0.1]], "at least 0, not -0.1"),
        ([[1.0, float("nan")]], "not nan"),
        ([[1.0, float("inf")]], "not inf"),
        ([[1.0, 10**400]], "not 1000"),
        ([[1.0, True]], "not True"),
        ([[1.0, "2"]], "not '2'"),
        ([[0.0, 0.0]], "all scores are 0"),
    ],
)
def test_a_bad_table_is_refused(table: Any, reason: str) -> None:
    with pytest.raises(FastKVError, match=reason) as caught:
        HeadKV(head_scores=table)
    assert caught.value.setting == "head_scores"


@pytest.mark.parametrize("text", ["", "[]", '{"scores": 3}', "{", "[" * 100_000, "\udcff"])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FastKVError, match=r"heads\.json"):
        HeadKV(head_scores=path)


def test_a_table_of_another_model_is_refused(tiny_llm: LLM) -> None:
    for table in (TABLE[:5], [[*row, 1.0] for row in TABLE]):
        with pytest.raises(FastKVError, match="but the model has 6 of 2"):
            tiny_llm.prefill(PROMPT, HeadKV(head_scores=table))


@pytest.mark.parametrize("policy", [AdaKV(kv_len=40), HeadKV(kv_len=40, head_scores=TABLE)], ids=["adakv", "headkv"])
def test_slots_that_others_used_before(tiny_llm: LLM, policy: AdaKV) -> None:
    """Short and long prompts, in slots where heads of other lengths lay, or heads that are all alike."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts = [PROMPT[0, :count].tolist() for count in (300, 120, 30, 250, 299)]
    tiny_llm.free_buffers()
    alone = []
    for prompt in prompts:
        alone.append(tiny_llm.generate(prompt, params, policy).token_ids)
        tiny_llm.free_buffers()
    tiny_llm.generate(prompts, params, SnapKV(kv_len=60), batch_size=2)
    together = tiny_llm.generate(prompts, params, policy, batch_size=2)
    assert [output.token_ids for output in together] == alone
    again = tiny_llm.generate(prompts, params, SnapKV(kv_len=60), batch_size=2)
    tiny_llm.free_buffers()
    fresh = tiny_llm.generate(prompts, params, SnapKV(kv_len=60), batch_size=2)
    assert [output.token_ids for output in again] == [output.token_ids for output in fresh]
