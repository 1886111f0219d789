"""Tables and pictures, from records made up here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from fastkv.eval.results import Record
from fastkv.eval.statistics import tango, wilson
from fastkv.eval.table import answered_by_all, render

BLANK = Record("", "full", "archive", 512, 0.5, 0, "", 500, 7, ("1",), "1", 1.0, 0.5, 100.0, 50, 100, 10, 100)


def made_up(
    labels: list[str], lengths: tuple[int, ...] = (512, 1024), depths: tuple[float | None, ...] = (0.0, 1.0), n: int = 3
) -> list[Record]:
    """Full is right everywhere; the policy of place i fails on the first i examples of each cell."""
    records = []
    for task, length, depth, index in itertools.product(["archive"], lengths, depths, range(n)):
        for place, label in enumerate(labels):
            one = replace(BLANK, id=f"{task}/{length}/{depth}/{index}", policy=label, task=task, length=length)
            score = float(index >= place)
            records.append(
                replace(
                    one, depth=depth, index=index, score=score, ttft_s=0.4 / (place + 1), kv_entries=100 // (place + 1)
                )
            )
    return records


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_scores_and_differences() -> None:
    """A row for each length and one for all; the mean, the difference to the first policy, and both intervals."""
    table = rows(render(made_up(["full", "fastkv"]), ["full", "fastkv"]))
    assert table[0] == ["task", "tokens", "examples", "full", "fastkv", "fastkv − full"]
    assert [row[:3] for row in table[2:5]] == [
        ["archive", "512", "6"],
        ["archive", "1,024", "6"],
        ["archive", "all", "12"],
    ]
    low, high = (100 * bound for bound in wilson(8, 12))
    assert table[4][4] == f"66.7 ({low:.1f} – {high:.1f})"
    low, high = (100 * bound for bound in tango(0, 4, 12))
    assert table[4][5] == f"−33.3 (−{-low:.1f} to −{-high:.1f})"
    assert table[4][3].startswith("100.0 (75.8 – 100.0)")


def test_costs() -> None:
    table = rows(render(made_up(["full", "fastkv"]), ["full", "fastkv"]))
    assert table[-2:] == [
        ["full", "0.400", "100.0", "100.0 %", "50.0 %"],
        ["fastkv", "0.200", "100.0", "50.0 %", "50.0 %"],
    ]


def test_several_tasks_have_a_row_of_their_own_and_one_for_all() -> None:
    other = [replace(one, id="vt" + one.id, task="vt", depth=None) for one in made_up(["full"], lengths=(512,))]
    table = rows(render([*made_up(["full"]), *other], ["full"]))
    assert [row[:3] for row in table[2:7]] == [
        ["archive", "512", "6"],
        ["archive", "1,024", "6"],
        ["archive", "all", "12"],
        ["vt", "512", "6"],
        ["all", "all", "18"],
    ]


def test_longbench_counts_each_dataset_the_same() -> None:
    """Its own row is the mean of its datasets, and stays so among other tasks; what was cut is told."""
    own = [
        replace(BLANK, id=f"{task}/{i}", task=f"longbench:{task}", length=None, depth=None, score=score, cut=i == 0)
        for task, scores in (("qasper", [0.0, 1.0]), ("lcc", [1.0] * 6))
        for i, score in enumerate(scores)
    ]
    text = render(own, ["full"])
    assert [row[:3] for row in rows(text)[2:5]] == [
        ["longbench:qasper", "own", "2"],
        ["longbench:lcc", "own", "6"],
        ["longbench, mean of 2", "own", "8"],
    ]
    assert rows(text)[4][3].startswith("75.0 (")
    assert not any(row[0] == "all" for row in rows(text))  # a mean over examples would be taken for LongBench's
    assert "2 of 8 LongBench prompts were too long and lost their middle (qasper 1 of 2, lcc 1 of 6).\n" in text
    table = rows(render([*own, *made_up(["full"], lengths=(512,))], ["full"]))
    assert [row[0] for row in table[2:7]] == [
        "longbench:qasper",
        "longbench:lcc",
        "archive",
        "longbench, mean of 2",
        "all",
    ]
    assert "LongBench" not in render(made_up(["full"]), ["full"])


def test_only_examples_that_every_policy_has_answered_count() -> None:
    """A run stopped between two policies must not favour the one that was asked first."""
    records = made_up(["full", "fastkv"])[:-1]
    assert len(answered_by_all(records, ["full", "fastkv"])) == 11
    assert rows(render(records, ["full", "fastkv"]))[4][2] == "11"
    assert "No example" in render(records[:1], ["full", "fastkv"])


def test_no_decoding_speed_where_answers_have_one_token() -> None:
    records = [replace(record, decode_tokens_per_s=None) for record in made_up(["full"])]
    assert rows(render(records, ["full"]))[-1][2] == "–"


@pytest.mark.parametrize("n_labels", [1, 5])
def test_pictures(tmp_path: Path, n_labels: int) -> None:
    """A heat map for each task with depths, and accuracy: PNG files that are not blank, whatever is asked for."""
    image = pytest.importorskip("matplotlib.image")
    from fastkv.eval.plots import draw_plots

    labels = ["full", *(f"fastkv:kv_retention=0.0{i},tsp_rate=1,min_tokens=8" for i in range(1, n_labels))]
    records = made_up(labels, lengths=(512, 1024, 2048), depths=(0.0, 0.5, 1.0))
    records += [replace(one, id="vt" + one.id, task="vt", depth=None, decode_tokens_per_s=None) for one in records]
    paths = draw_plots(records, labels, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["needle-archive.png", "accuracy.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = image.imread(path)
        assert pixels.shape[0] > 300 < pixels.shape[1]
        assert pixels[..., :3].std() > 0.02


def test_a_heat_map_shows_one_task_by_depth_and_length() -> None:
    """Depth downwards, length to the right, and nothing of another task or policy."""
    pytest.importorskip("matplotlib")
    from fastkv.eval.plots import heat_maps

    records = made_up(["full", "fastkv"], n=1)
    records = [replace(one, score=(one.depth or 0) / 2 + one.length / 2048) for one in records]
    records += [replace(one, id="niah" + one.id, task="niah_single", score=0.0) for one in records]
    names = {"full": "full", "fastkv": "fastkv"}
    figure = heat_maps(answered_by_all(records, list(names)), names, "archive")
    for axes in figure.axes[:2]:
        assert axes.images[0].get_array().tolist() == [[25.0, 50.0], [75.0, 100.0]]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1,024"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "100"]


def test_no_pictures_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastkv.eval.plots import draw_plots

    assert draw_plots([], ["full"], tmp_path) == []
