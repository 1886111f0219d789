"""The attention mass that each layer keeps: against a twin written as loops, and where it is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import H2O, LLM, AdaKV, FastKV, FullKV, GemFilter, Output, SamplingParams, SnapKV, StreamingLLM
from fastkv.cache.layer import Kept
from fastkv.cache.mass import POWER, REACH, SINKS, LayerMass, MassOfLayers, attention_mass, kept_mass, shares
from fastkv.cache.policy import Observation, Policy
from fastkv.cache.selection import PerHead, select_per_head
from fastkv.cli import main
from fastkv.console.summary import as_json, figures
from fastkv.engine.output import LOW_ATTENTION

PARAMS = SamplingParams(max_tokens=2)


def slow_share(attention: Tensor, window: int, kept: list[list[list[int]]]) -> list[float]:
    """One head, one entry at a time. attention: [B, Hkv, G, W, T]; kept: for each sequence and head its entries."""
    batch, n_heads, _, _, n_tokens = attention.shape
    shares = []
    for b in range(batch):
        held = total = 0.0
        for h in range(n_heads):
            for t in range(SINKS, n_tokens - window):
                near = range(max(SINKS, t - REACH), t + 1)
                weight = max(float(attention[b, h, :, :, s].max()) for s in near) ** POWER
                total += weight
                held += weight if t in kept[b][h] else 0.0
        shares.append(held / total)
    return shares


def observation(batch: int = 2, n_tokens: int = 60, window: int = 4) -> tuple[Observation, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(batch, 4, n_tokens, 8) * 2, torch.randn(batch, 2, n_tokens, 8)
    observed = Observation(0, q, k, k)
    return observed, observed.attention(window)


def fast_share(observed: Observation, kept: Kept, window: int) -> list[float]:
    assert observed.peaks is not None
    mass = attention_mass(observed.peaks, window)
    return (kept_mass(mass, kept) / mass.sum(dim=(1, 2))).tolist()


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def random_ids(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_the_share_matches_the_definition() -> None:
    observed, attention = observation()
    scores = torch.rand(2, 2, 56, generator=torch.Generator().manual_seed(1))
    kept = torch.cat((scores.topk(12).indices.sort().values, torch.arange(56, 60).expand(2, 2, -1)), dim=-1)
    fast = fast_share(observed, kept, 4)
    assert fast == close(slow_share(attention, 4, kept.tolist()))
    assert 0.05 < min(fast) < max(fast) < 0.95


def test_heads_of_different_lengths_match_it_too() -> None:
    observed, attention = observation()
    scores = torch.rand(2, 2, 56, generator=torch.Generator().manual_seed(2))
    kept = select_per_head(scores, torch.tensor([[10, 30], [32, 8]]), 4)
    by_head = [[[int(i) % 60 for i in row if i // 60 == head] for head in (0, 1)] for row in kept.index]
    assert fast_share(observed, kept, 4) == close(slow_share(attention, 4, by_head))


def test_what_was_dropped_before_counts_as_dropped() -> None:
    observed, attention = observation()
    chosen = torch.tensor([[3, 9, 40, 56, 57, 58, 59], [5, 20, 21, 56, 57, 58, 59]])
    everywhere = [[row, row] for row in chosen.tolist()]
    reached = slow_share(attention, 4, everywhere)
    book = MassOfLayers(2, torch.device("cpu"), known=True)
    book.keep(observed, None, 4)
    book.propagate(observed, chosen, 4)
    book.keep_all()
    book.keep(observed, chosen.unsqueeze(1).expand(-1, 2, -1), 4)
    for row in range(2):
        assert shares(book.layers, row)[1] == close((1.0, reached[row], reached[row] ** 2))


def test_a_layer_that_was_not_measured_weighs_as_much_as_the_others() -> None:
    def layer(kept: float, total: float, measured: bool = True) -> LayerMass:
        return LayerMass(torch.tensor([kept]), torch.tensor([total]), measured)

    measured, whole = [layer(0.1, 0.2), layer(0.0, 0.6)], layer(1.0, 1.0, measured=False)
    assert shares(measured) == (close(0.125), close((0.5, 0.0)))
    assert shares([whole, *measured]) == (close((0.4 * 1 + 0.1) / 1.2), close((1.0, 0.5, 0.0)))
    assert shares([whole, whole]) == (1.0, (1.0, 1.0))
    assert shares([None, *measured]) == (None, (None, close(0.5), 0.0))
    assert shares([None, None]) == (None, (None, None))
    assert shares([layer(0.0, 0.0), whole]) == (1.0, (1.0, 1.0))  # where nothing is attended to, nothing is lost


def test_all_that_there_is_is_everything() -> None:
    observed, _ = observation()
    for kept in (None, PerHead.everything(observed.k), torch.arange(60).expand(2, 2, -1)):
        assert fast_share(observed, kept, 4) == close([1, 1])
    assert not attention_mass(torch.rand(1, 2, 5), 4).any()  # the first entry and the window


def test_a_prompt_has_its_own_share_in_a_batch(tiny_llm: LLM) -> None:
    ids = random_ids(80, batch=3)
    policy = FastKV(kv_len=20, tsp_len=40, window=4)
    together = tiny_llm.prefill(ids, policy).mass
    assert len({round(shares(together, row)[0] or 0.0, 4) for row in range(3)}) == 3
    for row in range(3):
        alone = tiny_llm.prefill(ids[row : row + 1], policy).mass
        assert shares(together, row)[1] == close(shares(alone)[1])


def test_layers_after_the_cut_count_what_never_reached_them(tiny_llm: LLM) -> None:
    """Of few propagated tokens the later layers keep all, which is no more than the TSP layer propagated."""
    everything = FastKV(kv_retention=1.0, tsp_len=20, window=4)
    together, each = shares(tiny_llm.prefill(random_ids(80), everything).mass)
    assert each[:3] == (1, 1, 1)
    assert each[3] == each[4] == each[5] < 0.9  # type: ignore[operator]
    assert together == close((3 + 3 * (each[3] or 0)) / 6)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (FullKV(), [1.0] * 6),
        (SnapKV(kv_retention=1.0), [1.0] * 6),
        (StreamingLLM(kv_len=20), [None] * 6),
        (H2O(kv_len=20), [None] * 6),
        (GemFilter(filter_layer=1, kv_len=20), [None] * 6),
    ],
    ids=lambda value: value.name if isinstance(value, Policy) else "",
)
def test_policies_that_keep_all_or_look_at_no_window(tiny_llm: LLM, policy: Policy, expected: list[Any]) -> None:
    ids = random_ids(80)[0].tolist()
    output = tiny_llm.generate(ids, PARAMS, policy)
    assert list(output.metrics.layer_attention) == expected
    assert output.metrics.attention_kept == expected[-1]
    assert "attention" not in dict(figures(output))
    assert as_json(output)["warning"] is None


@pytest.mark.parametrize("policy", [FastKV(kv_len=20, tsp_len=60, window=4), AdaKV(kv_len=20, window=4)])
def test_a_sequence_that_continues(tiny_llm: LLM, policy: Policy) -> None:
    """What is kept anew is a share of the entries kept earlier and the new tokens; else all that is new is kept."""
    first = tiny_llm.prefill(random_ids(80), policy, max_tokens=60)
    again = tiny_llm.prefill(random_ids(40, seed=1), policy, max_tokens=8, cache=first.cache)
    together, each = shares(again.mass)
    assert together is not None
    assert len(each) == 6
    assert 0 < together < 1 if policy.compresses_again else together == 1


def test_a_continued_layer_matches_the_definition(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mass is that of the entries kept earlier and of the new tokens."""
    expected: list[float] = []
    real = MassOfLayers.keep

    def watched(self: MassOfLayers, observed: Observation, kept: Any, window: int) -> None:
        assert (observed.n_past, observed.k.shape[2]) == (20, 60)
        if not expected:  # the first layer; the next one writes over its keys
            expected.extend(slow_share(observed.attention(4), 4, kept.tolist()))
        real(self, observed, kept, window)

    policy = FastKV(kv_len=20, tsp_rate=1.0, window=4)
    first = tiny_llm.prefill(random_ids(80), policy, max_tokens=60)
    monkeypatch.setattr(MassOfLayers, "keep", watched)
    again = tiny_llm.prefill(random_ids(40, seed=1), policy, max_tokens=8, cache=first.cache)
    assert shares(again.mass)[1][0] == close(expected[0])


def test_what_a_draft_has_chosen_is_measured_by_the_drafts_attention(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[int, float] = {}
    real = MassOfLayers.keep

    def watched(self: MassOfLayers, observed: Observation, kept: Any, window: int) -> None:
        if observed.drafted is not None:
            (expected[observed.layer],) = slow_share(observed.drafted.attention(observed.k), window, kept.tolist())
        real(self, observed, kept, window)

    monkeypatch.setattr(MassOfLayers, "keep", watched)
    policy = FastKV(kv_len=20, tsp_rate=1.0, window=4, lookahead=3)
    _, each = shares(tiny_llm.prefill(random_ids(80), policy).mass)
    assert list(each) == [close(expected[layer]) for layer in range(6)]
    # Where tokens were dropped, what is left of the mass counts: the first layer after that, held against all of it.
    dropping = dataclasses.replace(policy, tsp_rate=0.5, tsp_layer=0, min_tokens=8)
    _, after = shares(tiny_llm.prefill(random_ids(80), dropping).mass)
    _, before = shares(
        tiny_llm.prefill(random_ids(80), dataclasses.replace(dropping, kv_len=None, kv_retention=1.0)).mass
    )
    assert after[1] == close(expected[1] * before[1])


def test_the_output_tells_them(tiny_llm: LLM) -> None:
    ids = random_ids(80)[0].tolist()
    policy = FastKV(kv_len=20, tsp_len=40, window=4)
    together, each = shares(tiny_llm.prefill(ids, policy).mass)
    for output in (tiny_llm.generate(ids, PARAMS, policy), tiny_llm.generate([ids, ids[:70]], PARAMS, policy)[0]):
        assert output.metrics.layer_attention == close(each)
        assert output.metrics.attention_kept == close(together)


def told(output: Output, share: float | None, **settings: Any) -> Output:
    """The same, had it kept this share."""
    metrics = dataclasses.replace(output.metrics, attention_kept=share)
    run = dataclasses.replace(output.run, settings={**output.run.settings, **settings})
    return dataclasses.replace(output, metrics=metrics, run=run)


def test_a_warning_below_the_threshold_and_none_above(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(list(range(40)), PARAMS, FastKV())
    low, enough = told(output, LOW_ATTENTION - 0.01), told(output, LOW_ATTENTION)
    percent = f"{100 * LOW_ATTENTION - 1:.0f} %"
    assert as_json(low)["warning"] == f"kept {percent} of attention mass: raise --kv-retention"
    assert dict(figures(low))["attention"] == as_json(low)["warning"]
    assert as_json(told(output, 0.0, kv_len=20))["warning"] == "kept 0 % of attention mass: raise --kv-len"
    assert as_json(enough)["warning"] is None
    assert dict(figures(enough))["attention"] == f"kept {100 * LOW_ATTENTION:.0f} % of attention mass"
    assert "attention" not in dict(figures(told(output, None))) | dict(figures(told(output, 1.0)))


PROMPT = "A quiet neighbor found a small boat. " * 20 + "The access code of the old mill is"
SMALL = ["--policy", "fastkv-paper", "--kv-len", "12", "--device", "cpu", "--dtype", "float32", "--max-tokens", "2"]


def test_the_command_warns(archive_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its figures, in --json and in the records of several prompts."""
    (tmp_path / "a.txt").write_text(PROMPT)
    (tmp_path / "b.txt").write_text("The access")
    command = ["--model", str(archive_folder), *SMALL, "--prompt", str(tmp_path / "a.txt")]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert printed["warning"].endswith(" % of attention mass: raise --kv-len")
    assert f"attention    {printed['warning']}\n" in err
    assert len(printed["metrics"]["layer_attention"]) == len(printed["metrics"]["layer_tokens"])
    assert printed["metrics"]["attention_kept"] < LOW_ATTENTION
    assert main([*command, "--prompt", str(tmp_path / "b.txt"), "--output", str(tmp_path / "out.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(record["warning"] or "" for record in records) == ["", printed["warning"]]
    assert '; see "warning" in 1 of them' in capsys.readouterr().err
