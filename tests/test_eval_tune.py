"""fastkv-eval tune: the needles, the search, and what the command writes."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, FastKV
from fastkv.cli import main as fastkv_run
from fastkv.console.machine import fingerprint
from fastkv.console.progress import ProgressLine
from fastkv.engine.cost import prefill_share
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError
from fastkv.eval import cli
from fastkv.eval.tune import command, needle
from fastkv.eval.tune.hay import hidden, pieces_of, stretch
from fastkv.eval.tune.needle import Kind, Needle, Needles, finds
from fastkv.eval.tune.report import Outcome, report
from fastkv.eval.tune.search import RATES, RETENTIONS, Trial, search, tsp_settings

MODEL = str(ROOT / "examples" / "archive" / "model")
TEXT = "Dr. Ames left. Who saw it?\n  def f(x):\n    return x\n\nThe end comes… here!  And 3.14 stays whole"


# --- the text ---------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_at_sentences_and_lines() -> None:
    pieces = pieces_of(TEXT)
    assert "".join(pieces) == TEXT
    assert pieces[1:4] == ["Ames left. ", "Who saw it?\n  ", "def f(x):\n    "]
    assert pieces[-1] == "And 3.14 stays whole"
    assert pieces_of(" \n ") == []


def test_a_stretch_has_its_share_and_not_much_more() -> None:
    pieces = [f"Sentence {n}. " for n in range(100, 200)]
    starts = set()
    for seed in range(50):
        found = stretch(pieces, 0.1, random.Random(seed))
        assert 10 <= len(found) <= 21
        starts.add(found[0])
    assert len(starts) > 20
    assert stretch(pieces, 1.0, random.Random(0)) == pieces


def test_a_needle_stands_alone_where_lines_are() -> None:
    assert hidden(["a\n", "b\n"], "N.", 0.5) == "a\nN.\nb"
    assert hidden(["A. ", "B."], "N.", 0.5) == "A. N. B."
    assert hidden(["A. ", "B."], "N.", 1.0) == "A. B. N."
    assert hidden([], "N.", 0.3) == "N."


# --- needles ----------------------------------------------------------------------------------------------------------


def archive_needle(llm: LLM, answer: str, begins: int = 0) -> Needle:
    """A prompt of the bundled model's kind, whose code is 5831."""
    assert llm.tokenizer is not None
    text = (
        "The access code of the calm owl is 9264. A painter wrapped the brass key at the market. "
        "The access code of the copper castle is 5831. The access code of the bold fox is 7102.\n"
        "Question: The access code of the copper castle is"
    )
    ids = llm.tokenizer.encode(answer)[len(llm.tokenizer.encode("")) :]
    return Needle((4, True), llm.tokenizer.encode(text), "5831", tuple(ids), begins)


def test_a_needle_is_found_where_greedy_decoding_gives_its_code(archive_llm: LLM) -> None:
    right = archive_needle(archive_llm, " 5831")
    nothing_left = FastKV(min_tokens=1, kv_retention=0.01, window=1, sinks=0)
    for policy, expected in ((FastKV(), True), (nothing_left, False)):
        text = archive_llm.generate(right.ids, SamplingParams(max_tokens=6), policy=policy).text
        assert ("5831" in text) is expected
        assert finds(archive_llm, right, policy) is expected


def test_another_way_to_the_same_code_is_right_too(archive_llm: LLM) -> None:
    """The full cache's words before the code are not what matters: this policy would leave them out."""
    assert finds(archive_llm, archive_needle(archive_llm, "The 5831", begins=2), FastKV())
    assert not finds(archive_llm, archive_needle(archive_llm, " 5830"), FastKV())


def test_needles_are_the_same_each_time_and_no_longer_than_asked(archive_llm: LLM) -> None:
    for texts in ([], [TEXT * 30, "A line\n" * 500]):
        drawing = Needles(archive_llm, texts, 200, 0)
        for kind in ((5, True), (0, False)):
            examples = [drawing._example(kind, index) for index in range(4)]
            assert examples == [Needles(archive_llm, texts, 200, 0)._example(kind, index) for index in range(4)]
            for example in examples:
                assert 150 < drawing._prompts.count(example) <= 200
                assert example.prompt.count(f"is {example.answers[0]}.") == 1


def test_a_text_shorter_than_the_length_is_taken_whole(archive_llm: LLM) -> None:
    example = Needles(archive_llm, ["One line.\nAnother one."], 500, 0)._example((5, True), 0)
    assert example.prompt.startswith("The access code of the ")
    assert "One line.\nAnother one." in example.prompt


class Drawing:
    """Needles of which only some kinds are found."""

    def __init__(self, *kinds: Kind) -> None:
        self.kinds, self.asked = kinds, list[tuple[Kind, int]]()

    def draw(self, kind: Kind, index: int) -> Needle | None:
        self.asked.append((kind, index))
        return Needle(kind, [index], "1", (1,), 0) if kind in self.kinds else None


def collected(*kinds: Kind, wanted: int = 20) -> tuple[list[Needle], int]:
    return command.collect(Drawing(*kinds), wanted, ProgressLine(None))  # type: ignore[arg-type]


def test_kinds_that_the_full_cache_never_finds_are_asked_no_more() -> None:
    found, asked = collected((5, True), (14, False))
    assert len(found) == 20
    assert asked == 20 + (len(needle.KINDS) - 2) * command.PROBES
    assert {one.kind for one in found[:10]} == {(5, True), (14, False)}


def test_the_easiest_needles_are_for_a_model_that_finds_no_others() -> None:
    assert {one.kind for one in collected((4, True))[0]} == {(4, True)}
    assert {one.kind for one in collected((4, True), (5, True))[0]} == {(5, True)}


def test_too_few_needles_are_an_error() -> None:
    with pytest.raises(FastKVError, match=r"the full cache finds 0 of 24 needles, and at least 16 are needed"):
        collected()


def test_both_halves_have_every_kind() -> None:
    found, _ = collected((5, True), (5, False), (14, False), wanted=24)
    one, other = command.halves(found)
    assert len(one) == len(other) == 12
    for kind in ((5, True), (5, False), (14, False)):
        assert [half.kind for half in one].count(kind) == [half.kind for half in other].count(kind) == 4
    assert not {(n.kind, *n.ids) for n in one} & {(n.kind, *n.ids) for n in other}


# --- the search -------------------------------------------------------------------------------------------------------

BASE = FastKV(min_tokens=1)


def trial(n: int, finds: Callable[[int, FastKV], bool]) -> Trial[int]:
    return Trial(range(n), finds, lambda policy, done, total: None)


def test_tsp_settings_cost_more_and_more_and_end_with_none(tiny_llm: LLM) -> None:
    found = tsp_settings(BASE, tiny_llm.config, 1024)
    work = [prefill_share(tiny_llm.config, policy, [1024]) for policy in found]
    assert work == sorted(work)
    assert {policy.kv_retention for policy in found} == {1.0}
    assert found[-1].tsp_rate == 1
    assert {policy.tsp_rate for policy in found[:-1]} == set(RATES)
    assert 6 // 2 - 1 in {policy.tsp_layer for policy in found}


def test_the_cheapest_tsp_that_loses_nothing_and_the_smallest_retention(tiny_llm: LLM) -> None:
    """One needle is lost under TSP unless its rate is 0.4; one of 20 may be lost by retention."""
    candidates = tsp_settings(BASE, tiny_llm.config, 1024)

    def found(n: int, policy: FastKV) -> bool:
        assert not isinstance(policy.tsp_rate, tuple)
        needed = (0.6, 0.07, *[0.03] * 17, 0.1)[n]
        return policy.kv_retention >= needed and (n != 3 or policy.tsp_rate >= 0.4)

    one = trial(20, found)
    best = search(one, BASE, candidates, 1)
    assert dataclasses.replace(best, kv_retention=1.0) == next(c for c in candidates if c.tsp_rate == 0.4)
    assert best.kv_retention == 0.1
    # What fails costs little: needles lost before come first, and the one too many ends it.
    failed = [tried for tried in one.tried if tried.lost > (tried.policy.kv_retention < 1)]
    assert [tried.run for tried in failed[:2]] == [4, 1]
    assert sum(tried.run for tried in failed) < 20 * len(failed) / 3


def test_another_reach_is_taken_where_it_keeps_less(tiny_llm: LLM) -> None:
    best = search(
        trial(10, lambda n, policy: policy.kv_retention >= (0.03 if policy.reach == 28 else 0.15)),
        BASE,
        tsp_settings(BASE, tiny_llm.config, 1024),
        0,
    )
    assert (best.reach, best.kv_retention) == (28, 0.03)


@pytest.mark.parametrize(("needed", "kept"), [(0.0, RETENTIONS[-1]), (0.45, 0.5), (0.9, 1.0)])
def test_the_ends_of_the_retentions(tiny_llm: LLM, needed: float, kept: float) -> None:
    candidates = tsp_settings(BASE, tiny_llm.config, 1024)
    best = search(trial(8, lambda n, policy: policy.kv_retention >= needed), BASE, candidates, 0)
    assert best.kv_retention == kept


def test_where_every_tsp_loses_it_is_off(tiny_llm: LLM) -> None:
    candidates = tsp_settings(BASE, tiny_llm.config, 1024)
    assert search(trial(8, lambda n, policy: policy.tsp_rate == 1), BASE, candidates, 0).tsp_rate == 1


# --- the command ------------------------------------------------------------------------------------------------------


def tune(*argv: str) -> int:
    return cli.main(["tune", "--model", MODEL, "--dtype", "float32", "--device", "cpu", *argv])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only codes that the bundled model knows, and few settings."""
    monkeypatch.setattr(command, "KINDS", ((4, True),))
    monkeypatch.setattr(command, "EXAMPLES", 6)
    monkeypatch.setattr(command, "FEWEST", 2)
    monkeypatch.setattr(command, "tsp_settings", lambda base, *_: [dataclasses.replace(base, tsp_rate=1.0)])
    monkeypatch.setattr("fastkv.eval.tune.search.REACHES", (10,))


def test_what_is_found_is_printed_written_remembered_and_used(
    quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, cache_folder: Path
) -> None:
    output, text = tmp_path / "policy.json", tmp_path / "letters.txt"
    text.write_text("The clerk found two letters near the station.\nA visitor sold a small boat.\n" * 20)
    assert tune("--length", "96", "--output", str(output), "--prompt", str(text)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(output.read_text())
    settings = content["settings"]
    assert (content["policy"], content["files"]) == ("fastkv", fingerprint(Path(MODEL)))
    assert content["prompts"] == ["letters.txt"]
    assert list(settings) == ["kv_retention", "min_tokens", "reach", "tsp_rate"]
    assert settings["min_tokens"] == max(int(settings["kv_retention"] * content["tokens"]), FastKV().window)
    assert f"fastkv-run --kv-retention {settings['kv_retention']:g} --min-tokens {settings['min_tokens']}" in out
    assert "needles above chose the settings. Of 3 others, full cache 100 %" in out
    remembered = cache_folder / "policies" / f"{content['files']}.json"
    assert json.loads(remembered.read_text()) == content
    assert str(remembered) in out

    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The clerk found two letters.")
    assert fastkv_run(["--model", MODEL, "--prompt", str(prompt), "--max-tokens", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {**json.loads(out)["policy"], **settings} == json.loads(out)["policy"]
    assert f"tuned        on {content['date']} for this model: fastkv, kv_retention" in err


def test_ctrl_c_leaves_nothing(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, cache_folder: Path
) -> None:
    def interrupted(*args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "finds", interrupted)
    assert tune("--length", "96", "--output", str(tmp_path / "policy.json")) == 130
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert not cache_folder.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--examples", "15"], "--examples: examples must be a whole number of at least 16"),
        (["--loss", "101"], "--loss: loss must be a number of at least 0 and at most 100"),
        (["--length", "0"], "--length: length must be a whole number of at least 1"),
        (["--length", "99999999"], "--length: 99999999 tokens and an answer of up to 64 are beyond the"),
        (["--length", "20"], "--length: 20 tokens are too short for task tune"),
        (["--prompt", "nowhere.txt"], "--prompt nowhere.txt: cannot be read"),
        (["--output", MODEL + "/policy.json"], "would be one of the model's files; name another folder"),
        (["--output", MODEL + "/config.json"], "is there already, and is none of this command's"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastkv-eval: error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (Path(MODEL) / "policy.json").exists()


def test_a_model_without_a_tokenizer(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--model", str(tiny_folder)]) == 2
    assert "the model has no tokenizer, and a task is a text" in capsys.readouterr().err


def outcome(found: int) -> Outcome:
    scores = [1.0] * found + [0.0] * (20 - found)
    settings = {"kv_retention": 0.05, "min_tokens": 51, "reach": 20, "tsp_layer": 3, "tsp_rate": 0.2}
    return Outcome(settings, 5.0, 40, 50, 1024, 20, [], scores, scores)


def test_a_loss_above_the_one_allowed_is_told() -> None:
    assert "more than the 5 points allowed" not in report(outcome(19))
    assert "That is more than the 5 points allowed" in report(outcome(18))
    assert "tuned      95.0 % (76.4 to 99.1)" in report(outcome(19))
    assert "--policy fastkv:kv_retention=0.05,min_tokens=51,reach=20,tsp_layer=3,tsp_rate=0.2" in report(outcome(18))
