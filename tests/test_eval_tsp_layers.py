"""fastkv-eval tsp-layers: what it measures is what the engine chooses by, and no advice goes unchecked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.policy import LayerPlan, Observation, Policy
from fastkv.engine.attention import causal_attention
from fastkv.engine.cost import prefill_flops, prefill_share
from fastkv.eval import cli
from fastkv.eval.example import Example, Task, contains_any
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.runner import Plan, Runner
from fastkv.eval.tsp_layers.advice import (
    Findings,
    Setting,
    candidates,
    default_setting,
    search,
    settled_layers,
)
from fastkv.eval.tsp_layers.check import AnswerCheck, ContinuationCheck, Result, Show, divergence
from fastkv.eval.tsp_layers.importance import Importance, Recorder, compare, mean, measure
from fastkv.eval.tsp_layers.report import check_table

MODEL = str(ROOT / "examples" / "archive" / "model")
IDS = torch.randint(1000, (400,), generator=torch.Generator().manual_seed(3)).tolist()


def silent(what: str, done: int, total: int) -> None:
    """Reports no progress."""


def recorded(llm: LLM, ids: list[int], scorer: FastKV, count: int = 50) -> Recorder:
    recorder = Recorder(scorer, [count])
    llm.prefill(ids, recorder, max_tokens=0)
    return recorder


@pytest.fixture(scope="session")
def tiny_ids(tiny_llm: LLM) -> list[int]:
    return [token % tiny_llm.config.vocab_size for token in IDS]


def test_measuring_changes_nothing_that_is_computed(tiny_llm: LLM, tiny_ids: list[int]) -> None:
    measured = tiny_llm.prefill(tiny_ids, Recorder(FastKV()), max_tokens=0).logits
    assert torch.equal(measured, tiny_llm.prefill(tiny_ids, FullKV(), max_tokens=0).logits)


def test_the_scores_are_those_of_a_full_context(tiny_llm: LLM, tiny_ids: list[int]) -> None:
    """Held against a layer loop of plain pieces, with no prefill in it."""
    model = tiny_llm._model
    hidden, rope = model.embed(torch.tensor([tiny_ids])), model.rope_of_range(0, len(tiny_ids))
    found = recorded(tiny_llm, tiny_ids, FastKV(window=6, tsp_reach=3, tsp_window=20)).scores[0]
    assert len(found) == len(model.blocks)
    with torch.inference_mode():
        for scores, block in zip(found, model.blocks, strict=True):
            expected = FastKV(window=20, reach=3).score(Observation(0, *block.project(hidden, rope)))[0].sum(dim=0)
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)  # not of the tokens that choose
            hidden = block.mlp(block.attention(hidden, rope, causal_attention))


@pytest.mark.parametrize("rate", [0.1, 0.35])  # the second has room for tokens that narrow pooling chooses
def test_a_choice_is_what_tsp_at_that_layer_propagates(tiny_llm: LLM, tiny_ids: list[int], rate: float) -> None:
    scorer = FastKV(min_tokens=8, reach=9)
    chosen = recorded(tiny_llm, tiny_ids, scorer, int(rate * len(tiny_ids))).chosen[0]
    for layer in range(tiny_llm.config.n_layers - 1):
        policy = replace(scorer, tsp_layer=layer, tsp_rate=rate)
        propagated = tiny_llm.prefill(tiny_ids, policy, max_tokens=0).tokens[layer + 1][0].tolist()
        n_choosing = min(scorer.tsp_window, len(propagated) // 2)
        assert chosen[layer].nonzero().flatten().tolist() == propagated[:-n_choosing]


def test_three_layers_compared_by_hand() -> None:
    """Of eight tokens in front of the window three are chosen."""
    scores = torch.tensor(
        [
            [9, 8, 7, 1, 1, 1, 1, 1],
            [9, 1, 1, 8, 7, 2, 1, 1],
            [1, 1, 9, 8, 7, 2, 1, 1],
        ],
        dtype=torch.float32,
    )
    chosen = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]]).double()
    found = compare([scores], [chosen], [0.5])
    third = 1 / 3
    expected = torch.tensor([[1, third, third], [third, 1, 2 * third], [third, 2 * third, 1]]).double()
    torch.testing.assert_close(found.overlap[0], expected)
    coverage = [[24 / 29, 11 / 30, 11 / 30], [11 / 29, 24 / 30, 16 / 30], [9 / 29, 16 / 30, 24 / 30]]
    torch.testing.assert_close(found.coverage[0], torch.tensor(coverage).double())
    at_random = 3 / 8
    behind_0 = (2 * (11 / 30 - at_random)) / (2 * (24 / 30 - at_random))
    behind_1 = (16 / 30 - at_random) / (24 / 30 - at_random)
    torch.testing.assert_close(found.attained[0], torch.tensor([behind_0, behind_1]).double())


def test_attention_without_preferences_leaves_nothing_to_miss() -> None:
    rounding = 1e-7 * torch.rand(3, 92, generator=torch.Generator().manual_seed(0))
    chosen = (rounding > rounding.quantile(0.9)).double()
    assert compare([1 + rounding], [chosen], [0.2]).attained.tolist() == [[1.0, 1.0]]


def test_every_prompt_counts_the_same() -> None:
    parts = [
        Importance((0.2,), *(torch.full(shape, x) for shape in ((1, 3, 3), (1, 3, 3), (1, 2)))) for x in (0.2, 0.6)
    ]
    combined = mean(parts)
    assert combined.overlap.unique().tolist() == pytest.approx([0.4])
    assert combined.coverage.unique().tolist() == pytest.approx([0.4])
    assert combined.attained.tolist() == [pytest.approx([0.4, 0.4])]


@pytest.mark.parametrize("n_tokens", [22, 24, 25, 47, 60, 110])
def test_no_choice_attains_more_than_the_later_layers_own(tiny_llm: LLM, tiny_ids: list[int], n_tokens: int) -> None:
    """Scores and choices are by the same queries, however few tokens are propagated."""
    found = measure(tiny_llm, tiny_ids[:n_tokens], FastKV(narrow=0.0), [0.5, 0.7])
    assert found.attained.max() <= 1 + 1e-6
    torch.testing.assert_close(found.overlap.diagonal(dim1=1, dim2=2), torch.ones(2, 6).double())


def test_a_prompt_too_short_for_a_rate_is_refused(tiny_llm: LLM, tiny_ids: list[int]) -> None:
    assert measure(tiny_llm, tiny_ids[:110], FastKV(), [0.1, 0.5]).rates == (0.1, 0.5)
    with pytest.raises(FastKVError, match=r"109 tokens is too short: at a rate of 0.1 .* --tsp-rate"):
        measure(tiny_llm, tiny_ids[:109], FastKV(), [0.1, 0.5])


@pytest.mark.parametrize(
    ("attained", "settled"),
    [
        ([0.0, 0.1, 0.1, 0.4, 0.5, 0.3, 0.0], [3, 4, 5]),
        ([0.3, 0.1, 0.1, 0.4, 0.5, 0.3, 0.0], [3, 4, 5]),  # layer 0 is good by itself: not where it settles
        ([0.90, 0.91, 0.96, 0.97], [2, 3]),  # attention that every layer puts on the same tokens lifts them all
        ([-0.2, 0.8, 0.3, 0.2], [1]),
        ([0.5], [0]),
        ([0.5, 0.5], [0, 1]),
    ],
)
def test_where_importance_settles(attained: list[float], settled: list[int]) -> None:
    assert settled_layers(attained) == settled


def test_candidates_come_by_their_work(tiny_llm: LLM) -> None:
    attained = torch.tensor([[0.0, 0.9, 0.9, 0.0, 0.0]] * 2 + [[0.0, 0.0, 0.0, 0.9, 0.0]])
    importance = Importance((0.1, 0.2, 0.3), torch.zeros(3, 6, 6), torch.zeros(3, 6, 6), attained)
    base = FastKV(min_tokens=8, pooling="avg")
    found = candidates(importance, base, tiny_llm.config, [1000])
    assert [(one.layer, one.rate) for one in found] == [(1, 0.2), (2, 0.2), (3, 0.3)]  # all above kv_retention
    assert [one.work for one in found] == sorted(one.work for one in found)
    assert found[0].policy == replace(base, tsp_layer=1, tsp_rate=0.2)
    for keeps in (FastKV(kv_retention=1), FastKV(kv_len=64)):  # no share of the prompt that a rate could undercut
        assert (1, 0.1) in [(one.layer, one.rate) for one in candidates(importance, keeps, tiny_llm.config, [1000])]
    short = candidates(importance, FastKV(kv_retention=0.05), tiny_llm.config, [200])  # the floor makes rates alike
    assert [(one.layer, one.rate) for one in short[:2]] == [(1, 0.2), (1, 0.1)]


def test_the_default_is_the_policys_own(tiny_llm: LLM) -> None:
    found = default_setting(FastKV(tsp_rate=0.25), tiny_llm.config, [1000])
    assert (found.layer, found.rate) == (2, 0.25)
    assert found.work == prefill_share(tiny_llm.config, FastKV(tsp_rate=0.25), [1000])


def test_operations_counted_by_hand(tiny_llm: LLM) -> None:
    """Two layers: ten tokens enter the first and four leave it, one leaves the last."""
    config = replace(
        tiny_llm.config,
        n_layers=2,
        hidden_size=6,
        intermediate_size=5,
        n_heads=4,
        n_kv_heads=2,
        head_dim=3,
        vocab_size=7,
    )
    kv, rest = 2 * 2 * 3 * 6, 2 * 4 * 3 * 6 + 3 * 6 * 5
    first = 2 * (10 * kv + 4 * rest) + 4 * 4 * (10 / 2) * 4 * 3
    last = 2 * (4 * kv + rest) + 4 * 4 * 4 * 3
    plans = [LayerPlan(10, 3, 4), LayerPlan(4, 3, None)]
    assert prefill_flops(config, plans) == first + last + 2 * 7 * 6


class Scripted:
    """A check whose results are known: right answers of ten in each of two groups, by the label of a setting."""

    groups = ("short", "long")

    def __init__(self, **right: tuple[int, int]) -> None:
        self._right = right
        self.ran: list[str] = []

    def run(self, label: str, policy: Policy, default: Result | None = None) -> Result:
        name = label.split(",")[0].split(" (")[0].replace(" ", "_")
        assert isinstance(policy, FullKV) or f"layer {policy.tsp_layer}," in label  # type: ignore[attr-defined]
        self.ran.append(name)
        return Result({g: [1.0] * n + [0.0] * (10 - n) for g, n in zip(self.groups, self._right[name], strict=True)})


def found_by(check: Scripted, *works: float) -> Findings:
    """A search with the default at layer 3 and candidates at layers 10, 11, … of these works."""

    def at(layer: int, work: float) -> Setting:
        return Setting(layer, 0.2, work, FastKV(tsp_layer=layer))

    return search(check, at(3, 0.5), [at(10 + i, work) for i, work in enumerate(works)])


def test_the_cheapest_that_is_no_worse_is_advised() -> None:
    """One answer less in one group, made up for in the other, is no reason to refuse it."""
    check = Scripted(full_cache=(10, 10), default=(9, 8), layer_10=(8, 9))
    found = found_by(check, 0.3, 0.4)
    assert (found.advice.layer, found.found, check.ran[2:]) == (10, True, ["layer_10"])
    assert [one.verdict for one in found.checked] == ["the default", "advised"]


def test_what_the_check_contradicts_gives_way_to_the_next() -> None:
    found = found_by(
        Scripted(full_cache=(10, 9), default=(10, 2), layer_10=(10, 1), layer_11=(4, 10), layer_12=(10, 2)),
        *(0.2, 0.3, 0.4),
    )
    assert found.advice.layer == 12
    assert [one.verdict for one in found.checked[1:]] == [
        "worse than the default: lower in all",
        "worse than the default: clearly lower at short",  # whatever the other group gains
        "advised",
    ]


def test_where_nothing_passes_the_default_stays() -> None:
    check = Scripted(full_cache=(10, 10), default=(10, 9), layer_10=(9, 9))
    found = found_by(check, 0.3, 0.5, 0.6)  # no less work, and the default leaves nothing clear to gain
    assert (found.advice.layer, found.found, len(check.ran)) == (3, False, 3)


def test_more_work_must_do_clearly_better() -> None:
    found = found_by(Scripted(full_cache=(10, 10), default=(3, 3), layer_10=(4, 4), layer_11=(9, 9)), 0.6, 0.7)
    assert (found.advice.layer, found.checked[0].verdict) == (11, "the default, clearly lower than the full cache")
    assert found.checked[1].verdict == "more work, and not clearly higher than the default"


def test_divergence_decides_only_where_scores_are_level_and_imperfect() -> None:
    near, far = Result({"a": [0.5, 1.0]}, [0.1, 0.1]), Result({"a": [1.0, 0.5]}, [0.1, 0.2])
    assert (near.worse_than(far), far.worse_than(near)) == (None, "a higher KL")
    assert Result({"a": [1.0]}, [0.2]).worse_than(Result({"a": [1.0]}, [0.1])) is None
    assert Result({"a": [0.9]}, [0.2]).worse_than(Result({"a": [0.8]}, [0.1])) is None


def test_questions_stop_after_a_group_that_is_clearly_lower(archive_llm: LLM) -> None:
    text = "The access code of the copper castle is 1395. Question: The access code of the copper castle is"
    assert archive_llm.tokenizer is not None
    ids = archive_llm.tokenizer.encode(text)
    right = archive_llm.generate(ids, SamplingParams(max_tokens=3), policy=FullKV()).text
    shown: list[tuple[str, int, int]] = []

    def check(*answers: str, show: Show = silent) -> AnswerCheck:
        """The question, with each of these answers expected in turn, in two groups."""
        tasks = [
            Task(name, "", contains_any, 3, lambda draw: Example(text, (answers[draw.slot.index],)), has_length=False)
            for name in ("a", "b")
        ]
        plan = Plan(tuple(tasks), (), (), examples=len(answers))
        runner = Runner(archive_llm, plan, [PolicySpec("full", FullKV())])
        return AnswerCheck(runner, [runner.question(slot) for slot in plan.slots()], show)

    six = check(right, "another", *[right] * 4, show=lambda *what: shown.append(what))
    result, some = six.run("full", FullKV()), [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert result.scores == {"a": some, "b": some}
    assert shown == [("full", done, 12) for done in range(12)]
    # One answer less is not clearly lower. Five are, from the other side.
    assert list(six.run("again", FullKV(), Result({"a": [1.0] * 6, "b": some})).scores) == ["a", "b"]
    assert six.run("nothing kept", FastKV(kv_len=1, window=1)).total == 0  # the policy is what is checked
    assert list(check(*["another"] * 6).run("lost", FullKV(), result).scores) == ["a"]


def test_continuations_count_the_tokens_up_to_the_first_other_one(tiny_llm: LLM, tiny_ids: list[int]) -> None:
    prompts = [tiny_ids, tiny_ids[:200]]
    check, policy = ContinuationCheck(tiny_llm, prompts, 8, silent), FastKV(tsp_rate=0.9, kv_retention=0.9)
    assert check.run("full", FullKV()) == Result({"greedy tokens": [1.0, 1.0]}, [0.0, 0.0])
    result, params = check.run("small", policy), SamplingParams(max_tokens=8)
    for ids, score, kl in zip(prompts, result.all_scores, result.divergence, strict=True):
        theirs, ours = (tiny_llm.generate(ids, params, policy=one).token_ids for one in (FullKV(), policy))
        alike = next((i for i, (x, y) in enumerate(zip(theirs, ours, strict=False)) if x != y), len(theirs))
        assert score == alike / len(theirs)
        p, q = (tiny_llm.prefill(ids, one, max_tokens=0).logits[0].softmax(0) for one in (FullKV(), policy))
        assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-2)
    assert all(0 < score < 1 for score in result.all_scores)  # both go another way somewhere: something to count
    everything = FastKV(tsp_rate=1, kv_retention=1)
    assert check.run("all", everything).scores == {"greedy tokens": [1.0, 1.0]}


def test_continuations_end_where_the_text_does(archive_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The access code of the copper castle is 1395. Question: The access code of the copper castle is"
    assert archive_llm.tokenizer is not None
    ids, steps, decode = archive_llm.tokenizer.encode(text), [], LLM.decode
    whole = archive_llm.generate(ids, SamplingParams(max_tokens=32), policy=FullKV())
    monkeypatch.setattr(LLM, "decode", lambda self, *args: steps.append(args) or decode(self, *args))  # type: ignore[func-returns-value]
    ContinuationCheck(archive_llm, [ids], 32, silent).run("full", FullKV())
    assert whole.finish_reason == "stop"
    assert len(steps) == len(whole.token_ids) - 1 < 31


def test_divergence_is_from_the_full_cache_to_the_policy() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    assert divergence(p.log(), q.log() + 3) == pytest.approx(0.25 * torch.tensor(2.0).log().item())
    assert divergence(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5])) == pytest.approx(0.192745, abs=1e-6)


def test_the_check_as_a_table() -> None:
    check = Scripted(full_cache=(10, 5), default=(10, 0), layer_10=(10, 5))
    found = found_by(check, 0.25)
    lines = check_table(found.full, found.checked).splitlines()
    assert lines[0] == "| setting | prefill work | short | long | all | against the default | verdict |"
    # Wilson's interval of 15 of 20: 53.1 to 88.8
    assert lines[2].startswith("| full cache | 100.0 % | 100.0 | 50.0 | 75.0 (53.1 – 88.8) | +25.0 (")
    assert lines[3].startswith("| layer 3, rate 0.2 | 50.0 % | 100.0 | 0.0 | 50.0 (29.9 – 70.1) | – | the default")
    assert lines[4].endswith("| advised |")
    stopped = replace(found.checked[1], result=Result({"short": [1.0, 0.0]}), verdict="worse")
    row = check_table(found.full, [found.checked[0], stopped]).splitlines()[4]
    assert row == "| layer 10, rate 0.2 | 25.0 % | 50.0 | – | – | – | worse |"


@pytest.fixture
def command() -> Callable[[str], int]:
    """The command, as `fastkv-eval tsp-layers …` calls it; {model} is the bundled model."""

    def run(line: str) -> int:
        try:
            return cli.main(["tsp-layers", *line.replace("{model}", MODEL).split()])
        except SystemExit as left:  # the parser's own complaints
            return int(str(left.code))

    return run


@pytest.mark.parametrize(("layer", "advice"), [("", 3), (",tsp_layer=2", 3), (",tsp_layer=5", 3)])
def test_the_bundled_model_is_advised_well(
    command: Callable[[str], int], capfd: pytest.CaptureFixture[str], tmp_path: Path, layer: str, advice: int
) -> None:
    """The paper's scores settle at layer 3, the default. Layer 2 loses nearly all answers; layer 5 is more work."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    files = f"--json {tmp_path}/figures.json" + ("" if layer else f" --plot {tmp_path}/picture.png")
    examples = f"--task archive --length 512 --depth 0.2 0.8 --examples 2 --policy fastkv-paper:min_tokens=8{layer}"
    assert command(f"--model {{model}} --dtype float32 --tsp-rate 0.1 0.2 {examples} {files}") == 0
    out, err = capfd.readouterr()
    assert err == ""
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["advice"] == {"tsp_layer": advice, "tsp_rate": 0.2, "is_default": not layer}
    assert [layers[0] for layers in report["settled"]] == [3, 3]
    right = {one["layer"]: sum(map(sum, one["scores"].values())) for one in report["checked"]}
    assert right[3] == max(right.values()) >= 3
    if layer:
        assert out.splitlines()[-1].startswith("Advice: --tsp-layer 3 --tsp-rate 0.2. ")
    else:
        assert out.splitlines()[-1].startswith("Advice: keep the default, --tsp-layer 3 --tsp-rate 0.2: ")
    assert "| layer 3 | " in out
    assert layer or imread(tmp_path / "picture.png").std() > 0.05


def test_a_users_own_prompt(
    command: Callable[[str], int],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held against the full cache: the tokens that agree, and the divergence of the next one."""
    path = tmp_path / "prompt.txt"
    path.write_text((ROOT / "examples" / "archive" / "prompt.txt").read_text()[-5000:])
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    arguments = f"--model {{model}} --prompt {path} --max-tokens 4 --tsp-rate 0.1 0.2 --dtype float32 --threads 1"
    assert (command(arguments), threads) == (0, [1])
    out, err = capfd.readouterr()
    assert err == ""
    assert "| setting | prefill work | greedy tokens | against the default | KL, nats | verdict |" in out
    assert "| full cache | 100.0 % | 100.0 (" in out
    assert out.splitlines()[-1].startswith("Advice: ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--task archive", "--model"),
        ("--model {model}", "give either --prompt FILE or --task NAME"),
        ("--model {model} --task archive --prompt README.md", "give either --prompt FILE or --task NAME"),
        ("--model {model} --prompt README.md --length 512", "--length is for --task"),
        ("--model {model} --prompt README.md --qa-file q.jsonl", "--qa-file is for --task"),
        ("--model {model} --prompt no/such.txt", "--prompt no/such.txt: cannot be read"),
        ("--model {model} --task archive --tsp-rate 0.1 1", "--tsp-rate 1: must be above 0 and below 1"),
        ("--model {model} --task archive --tsp-rate 0.05 0.1", "no rate is above its kv_retention"),
        ("--model {model} --task archive --policy full", "--policy full: has no TSP layer"),
        ("--model {model} --task archive --policy fastkv:tsp_len=99", "leave tsp_len out"),
        ("--model {model} --task archive --policy fastkv:tsp_layer=8", "tsp_layer must be below"),
        ("--model {model} --task archive --examples 0", "--examples: examples must be"),
        ("--model {model} --task archive --depth 2", "--depth: depth must be"),
        ("--model {model} --task archive --length 8190", "--length: 8190 tokens and an answer of 8"),
        ("--model {model} --task archive --length 128", "too short: at a rate of 0.05"),
        ("--model {model} --task archive --plot picture.pdf", "--plot: picture.pdf: the plot is a PNG"),
        ("--model {model} --task archive --plot no/such/p.png", "--plot: no/such/p.png: cannot be written"),
        ("--model {model} --task archive --json no/such/f.json", "--json: no/such/f.json: cannot be written"),
        ("--model {model} --task other", "task must be one of"),
        ("--model {model} --task longbench", "task must be one of"),
        ("--model no/such/folder --task archive", "no/such/folder"),
        ("--model {tiny} --task archive", "the model has no tokenizer"),
        ("--model {tiny} --prompt {prompt}", "the model has no tokenizer"),
        ("--model {model} --prompt {prompt} --max-tokens 8000", "--max-tokens"),
    ],
)
def test_a_mistake_is_one_line(
    command: Callable[[str], int], capfd: pytest.CaptureFixture[str], tiny_folder: Path, line: str, says: str
) -> None:
    status = command(
        line.replace("{tiny}", str(tiny_folder)).replace("{prompt}", str(ROOT / "examples" / "archive" / "prompt.txt"))
    )
    out, err = capfd.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("fastkv-eval: error: ")
    assert says in err
