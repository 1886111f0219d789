"""fastkv-eval compare: every policy there is, with the same number of entries, and what the tables say of them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, FastKV, FastKVError, FullKV, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.layer import EntryShape
from fastkv.cache.policies import PyramidInfer
from fastkv.cache.policy import plan_layers
from fastkv.console.markdown import BEGIN, END, check_page, write_page
from fastkv.console.policy_text import read_settings, write_settings
from fastkv.eval import cli
from fastkv.eval.cli_flags import PARSERS, check
from fastkv.eval.compare import command as compare_command
from fastkv.eval.compare.command import page_part
from fastkv.eval.compare.reads import read_share
from fastkv.eval.compare.settings import Terms, equal_policies, nearest_decay, off_by, wanted
from fastkv.eval.compare.table import render
from fastkv.eval.policy_spec import PolicySpec, parse_policies
from fastkv.eval.results import Record

MODEL = str(ROOT / "examples" / "archive" / "model")


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A table of heads for a model of 8 layers and 2 KV heads, no two of them alike."""
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"scores": [[layer / 10, 1 / (1 + layer)] for layer in range(8)]}))
    return path


EQUAL = [name for name in POLICIES if name != "dbudget"]
NO_BUDGET = "dbudget is left out: it has no budget that could be made equal"

# Settings


@pytest.mark.parametrize("retention", [0.05, 0.1, 0.2, 0.3, 0.45])
@pytest.mark.parametrize("lengths", [(512,), (1000, 2047, 8192)])
def test_every_policy_plans_the_same_number_of_entries(heads: Path, retention: float, lengths: tuple[int, ...]) -> None:
    """A policy that joins POLICIES is in the comparison, and is held to this."""
    found, left_out = equal_policies(None, [retention], Terms(8, 2, lengths, heads))
    assert ({one.title for one in found}, left_out) == (set(EQUAL), [NO_BUDGET])
    assert (found[0].title, found[0].retention) == ("full", None)
    for spec in found[1:]:
        for n_tokens in lengths:
            kept = sum(plan.kept for plan in plan_layers(spec.policy, 8, n_tokens))
            if spec.title == "pyramidinfer":
                assert kept == pytest.approx(8 * int(retention * n_tokens), rel=0.01)
            else:
                assert kept == 8 * int(retention * n_tokens), spec.label


def test_short_prompts_keep_the_same_floor(heads: Path) -> None:
    found, _ = equal_policies(None, [0.1], Terms(8, 2, (60,), heads))
    assert (wanted(0.1, 60), wanted(0.1, 5), wanted(0.1, 99)) == (8, 5, 9)
    for spec in found[1:]:
        assert sum(plan.kept for plan in plan_layers(spec.policy, 8, 60)) == 8 * 8, spec.label


@pytest.mark.parametrize(("n_layers", "retention"), [(8, 0.1), (8, 0.4), (32, 0.1), (32, 0.05), (2, 0.2)])
def test_no_decay_comes_nearer(n_layers: int, retention: float) -> None:
    terms = Terms(n_layers, 2, (700, 3000))
    policy = PyramidInfer(first_layer=0, floor=retention / 2, min_tokens=8)
    decay = nearest_decay(policy, retention, terms)
    off = off_by(replace(policy, decay=decay), retention, terms)
    kept = [[p.kept for p in plan_layers(replace(policy, decay=decay), n_layers, n)] for n in terms.lengths]
    assert off == pytest.approx(
        fmean(fmean(k) / int(retention * n) for k, n in zip(kept, terms.lengths, strict=True)) - 1
    )
    assert abs(off) < 0.005
    others = [replace(policy, decay=decay + step * 1e-5) for step in (*range(-9, 10), -200, 200)]
    assert abs(off) <= min(abs(off_by(other, retention, terms)) for other in others)


def test_a_label_is_what_policy_takes(heads: Path) -> None:
    """Each one, given to fastkv-eval, is that policy again."""
    texts = ["fastkv:tsp_layer=1/3/5,tsp_rate=0.5/0.3/0.2", *EQUAL]
    found, _ = equal_policies(texts, [0.1, 0.2], Terms(8, 2, (900,), heads))
    assert len(found) == 1 + 2 * len(EQUAL)
    again = parse_policies([one.label for one in found], 8)
    assert [one.policy for one in again] == [one.policy for one in found]


@pytest.mark.parametrize(("word", "value"), [("no", False), ("yes", True), ("False", False), ("true", True)])
def test_yes_and_no_are_words(word: str, value: bool) -> None:
    (found,) = parse_policies([f"fastkv:values={word}"])
    assert found.policy == FastKV(values=value)
    assert read_settings(write_settings("fastkv", {"values": value})) == ("fastkv", {"values": value})
    with pytest.raises(FastKVError, match="tsp_rate must be a number"):
        parse_policies([f"fastkv:tsp_rate={word}"])


def test_several_values_stand_between_slashes() -> None:
    (several,) = parse_policies(["fastkv:tsp_layer=9/15/23, tsp_rate=0.5/0.2/0.1"], 32)
    assert several.policy == FastKV(tsp_layer=(9, 15, 23), tsp_rate=(0.5, 0.2, 0.1))
    with pytest.raises(
        FastKVError, match="pooling must be one of max, avg, forward, not '1/max'"
    ):  # a text, as any other
        parse_policies(["fastkv:pooling=1/max"])
    with pytest.raises(FastKVError, match=r"--policy fastkv:tsp_layer=1/2: tsp_rate must have a value for each"):
        parse_policies(["fastkv:tsp_layer=1/2"])


def test_what_reaches_a_layer_is_enough_for_it() -> None:
    """Above the default rate of TSP, as many are propagated as are kept; a rate of one's own is left alone."""
    terms = Terms(8, 2, (1000,))
    found, _ = equal_policies(["fastkv", "fastkv:tsp_rate=0.5"], [0.1, 0.3], terms)
    assert [one.policy for one in found[1:]] == [
        FastKV(kv_retention=0.1, min_tokens=8),
        FastKV(kv_retention=0.1, min_tokens=8, tsp_rate=0.5),
        FastKV(kv_retention=0.3, min_tokens=8, tsp_rate=0.3),
        FastKV(kv_retention=0.3, min_tokens=8, tsp_rate=0.5),
    ]
    (_, wide), _ = equal_policies(["snapkv:window=32"], [0.1], terms)
    assert wide.policy == POLICIES["snapkv"](window=32, kv_retention=0.1, min_tokens=32)  # type: ignore[call-arg]


def test_who_cannot_keep_as_much_takes_no_part() -> None:
    """Left out with a line where all were asked for, and a mistake where it was named."""
    found, left_out = equal_policies(None, [0.1, 0.7], Terms(8, 2, (1000,)))
    assert left_out[0] == "headkv is left out: it needs --head-scores FILE"
    assert left_out[1] == NO_BUDGET
    assert left_out[2].startswith("pyramidkv is left out: it keeps ")
    assert left_out[2].endswith(" % less than the others at --kv-retention 0.7")
    assert len(left_out) == 3
    assert {one.title for one in found if one.retention == 0.7} == set(EQUAL) - {"full", "headkv", "pyramidkv"}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["headkv"], "--policy headkv: it needs --head-scores FILE"),
        (["fastkv:tsp_rate=0.05"], "--policy fastkv:tsp_rate=0.05: it keeps 25.0 % less than the others"),
        (["fastkv:kv_retention=0.2"], "--policy fastkv:kv_retention=0.2: kv_retention is what makes the policies keep"),
        (["snapkv:keep_mass=0.9"], "keep_mass is what makes the policies keep the same"),
        (["dbudget"], "--policy dbudget: it has no budget that could be made equal"),
        (["snapkv:min-tokens=64"], "min_tokens is what makes the policies keep the same"),
        (["pyramidinfer:decay=0.5"], "decay is what makes the policies keep the same"),
        (["pyramidinfer:first_layer=4"], "% more than the others at --kv-retention 0.1"),
        (["full:kv_len=3"], "kv_len is what makes"),
        (["fastkv", "fastkv:kernel=7"], "--policy fastkv:kernel=7: is the same policy as fastkv; leave"),
        (["fastkv:kernel=7,kernel=9"], "--policy fastkv:kernel=7,kernel=9: has kernel twice"),
        (["fastkv:tsp_layer=8"], "--policy fastkv:tsp_layer=8: tsp_layer must be below"),
        (["full"], "nothing to compare with the full cache"),
        ([" full", "full:"], "nothing to compare with the full cache"),
    ],
)
def test_policies_that_cannot_be_compared(texts: list[str], says: str) -> None:
    with pytest.raises(FastKVError) as complaint:
        equal_policies(texts, [0.1], Terms(8, 2, (1000,)))
    assert says in str(complaint.value)


# Equal bytes read in a step

READ_FEW = ("quest", "clusterkv", "rocketkv")
LONG = Terms(30, 2, (900, 1100), by="read", head_dim=16)


@pytest.mark.parametrize("name", [*READ_FEW, "sinkrouter"])
@pytest.mark.parametrize("dense", [0, 2])
def test_what_a_step_will_read_is_what_it_reads(tiny_llm: LLM, name: str, dense: int) -> None:
    """Planned from the policy alone, and counted by a step of a model: the same, but for the step's own entry."""
    settings: dict[str, Any] = {} if name == "sinkrouter" else {"read_retention": 0.2, "min_tokens": 1}
    policy: Any = POLICIES[name](dense_layers=dense, **settings)
    config = tiny_llm.config
    ids = [5 + place % 90 for place in range(400)]
    out = tiny_llm.generate(ids, SamplingParams(max_tokens=2, ignore_eos=True), policy)
    shape = EntryShape(config.n_kv_heads, config.head_dim, tiny_llm.dtype)
    entry = 2 * config.head_dim * tiny_llm.dtype.itemsize
    own = config.n_layers * config.n_kv_heads
    planned = read_share(policy, config.n_layers, 400, shape) * own * 400
    assert out.metrics.read_bytes == pytest.approx((planned + own) * entry)
    assert (planned < own * 400) == (name != "sinkrouter")


def test_policies_that_read_few_read_as_much_as_the_others_keep() -> None:
    """What chooses, and layers that read everything, are part of it; the others keep, and so read, the share."""
    found, left_out = equal_policies([*READ_FEW, "snapkv", "quest:dense_layers=0"], [0.25], LONG)
    assert not left_out
    for spec in found[1:]:
        shares = [read_share(spec.policy, 30, length, LONG.shape) for length in LONG.lengths]
        if spec.title == "snapkv":
            assert spec.label == "snapkv:kv_retention=0.25,min_tokens=8"
            assert shares == [int(0.25 * length) / length for length in LONG.lengths]
            continue
        assert "kv_retention" not in spec.label
        assert fmean(shares) == pytest.approx(0.25, rel=0.1)
        other: Any = spec.policy
        for step in (-0.002, -0.001, 0.001, 0.002):
            changed = replace(other, read_retention=other.read_retention + step)
            others = fmean(read_share(changed, 30, length, LONG.shape) for length in LONG.lengths)
            assert abs(fmean(shares) - 0.25) <= abs(others - 0.25)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sinkrouter", "--policy sinkrouter: how much its steps read, the text decides"),
        ("quest", "--policy quest: it reads 16 % of the cache at least, what chooses and dense_layers included: raise"),
        ("clusterkv:read_retention=0.2", "read_retention is what makes the policies read the same; --read-retention"),
        ("rocketkv:read_len=9", "read_len is what makes the policies read the same"),
        ("snapkv:kv_dtype=int8", "kv_dtype: entries are compared in the model's dtype"),
        ("dbudget", "it has no budget that could be made equal"),
    ],
)
def test_who_cannot_read_as_much_takes_no_part(text: str, says: str) -> None:
    """Two of thirty layers that read everything, and an index, are more than a tenth."""
    with pytest.raises(FastKVError) as complaint:
        equal_policies([text], [0.1], LONG)
    assert says in str(complaint.value)


def test_two_shares_that_come_to_the_same_are_told() -> None:
    with pytest.raises(
        FastKVError, match=r"--policy rocketkv: --read-retention 0.3 and 0.30001 give it the same setting"
    ):
        equal_policies(["rocketkv"], [0.3, 0.30001], LONG)
    with pytest.raises(FastKVError, match=r"--policy snapkv: is the same policy as snapkv"):
        equal_policies(["snapkv", "snapkv"], [0.3], LONG)


def test_windows_are_not_compared_by_reads(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with one reads it, whatever a budget says."""
    config = replace(tiny_llm.config, sliding_windows=(None, 512) * (tiny_llm.config.n_layers // 2))
    monkeypatch.setattr(tiny_llm, "config", config)
    monkeypatch.setattr(compare_command, "load", lambda args: (tiny_llm, Path(MODEL)))
    args = PARSERS["compare"]().parse_args(["--model", MODEL, "--task", "archive", "--read-retention", "0.3"])
    check(args)
    args.words = []
    with pytest.raises(FastKVError, match="--read-retention does not compare what layers with a sliding window read"):
        compare_command.run(args)


def test_the_note_of_what_was_read() -> None:
    """Counted against the full cache on the same example, as a share of what was wanted."""
    full, few = rival("full", None), rival("few", 0.2)
    base = [record(full, index, read_bytes=1000) for index in range(2)]
    ours = [record(few, index, read_bytes=read) for index, read in enumerate((200, 220))]
    text = render([*base, *ours], [full, few], 256, by="read")
    assert text.startswith("### archive, 20 % of the KV cache read in a step: 2 examples\n")
    assert "chooses included: 20 % of what those of the full cache read; " in text
    assert "of single examples: few +5.00 % (+0.00 % to +10.00 %)." in text
    assert "Counted in every prompt" not in text
    alone = render([replace(one, read_bytes=None) for one in (*base, *ours)], [full, few], 256, by="read")
    assert "of the full cache read; not counted." in alone


# Tables


def rival(name: str, retention: float | None = 0.1) -> PolicySpec:
    label = name if retention is None else f"{name}:kv_retention={retention:g}"
    return PolicySpec(label, FullKV() if retention is None else FastKV(kv_retention=retention), name, retention)


def record(spec: PolicySpec, index: int, length: int = 500, **changes: Any) -> Record:
    """Four layers of two KV heads."""
    kept = length if spec.retention is None else int(spec.retention * length)
    one = Record(
        *(f"archive/{length}/{index}", spec.label, "archive", length, 0.5, index, "", length, 7, ("1",), "1"),
        *(1.0, 0.4, 100.0, 3 << 20, 6 << 20, 8 * kept, 8 * length),
    )
    return replace(one, **changes)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_row_for_each_policy() -> None:
    """Medians, gains on the same example, and bytes of the entries that were kept."""
    full, half = rival("full", None), rival("half", 0.5)
    base = [record(full, index, ttft_s=ttft) for index, ttft in enumerate((0.2, 0.4, 0.9))]
    times = ((0.1, 0.0), (0.1, 1.0), (0.9, 1.0))
    ours = [record(half, i, ttft_s=t, score=s, decode_tokens_per_s=150.0 + i) for i, (t, s) in enumerate(times)]
    text = render([*base, *ours], [full, half], entry_bytes=256)
    assert text.startswith("### archive, 50 % of the KV cache: 3 examples\n\n| policy | score | − full |")
    first, second = rows(text)[2:]
    full_mib, half_mib = 8 * 500 * 256 / 2**20, 8 * 250 * 256 / 2**20
    assert first[2:] == ["", "0.400", "1.00", "100.0", "1.00", "100.00 %", f"{full_mib:.3f}", "3.000"]
    assert second[0] == "half"
    assert second[1].startswith("66.7 (")
    assert second[2].startswith("−33.3 (−")
    assert second[3:] == ["0.100", "2.00", "151.0", "1.51", "50.00 %", f"{half_mib:.3f}", "3.000"]
    assert "Counted in every prompt: every policy but full kept int(0.5 · N) entries" in text
    assert "`full`, `half:kv_retention=0.5`." in text
    assert len(rows(text)) == 4  # one length needs no table by length


def test_what_a_step_reads_has_a_column_where_all_records_say_it() -> None:
    full, half = rival("full", None), rival("half", 0.5)
    told = [record(one, index, read_bytes=(index + 1) << 20) for index in (0, 1) for one in (full, half)]
    assert [row[-1] for row in rows(render(told, [full, half], 256))] == ["read a step, MiB", "---", "1.500", "1.500"]
    older = [replace(told[0], read_bytes=None), *told[1:]]
    assert rows(render(older, [full, half], 256))[0][-1] == "allocated, MiB"


def test_scores_and_gains_by_length() -> None:
    full, tenth = rival("full", None), rival("tenth")
    records = [record(full, 0, length) for length in (500, 2000)]
    records += [record(tenth, 0, 500, score=0.0, ttft_s=0.8), record(tenth, 0, 2000, ttft_s=0.1)]
    table = rows(render(records, [full, tenth], 256))[4:]
    assert table[0] == ["score", "500 tokens", "2,000 tokens"]
    assert [cell.split(" ")[0] for cell in table[3]] == ["tenth", "0.0", "100.0"]
    assert table[4] == ["first token, × full", "500 tokens", "2,000 tokens"]
    assert table[7] == ["tenth", "0.50", "4.00"]


def test_a_table_for_each_retention() -> None:
    full, tenth, fifth = rival("full", None), rival("one", 0.1), rival("one", 0.2)
    records = [record(spec, 0) for spec in (full, tenth, fifth)]
    text = render(records, [full, tenth, fifth], 256, ["two is left out: why"])
    titles = [line for line in text.splitlines() if line.startswith("###")]
    assert titles == [f"### archive, {share} % of the KV cache: 1 example" for share in (10, 20)]
    assert [row[7] for row in rows(text) if row[0] == "one"] == ["10.00 %", "20.00 %"]
    assert text.endswith("\n\ntwo is left out: why\n")


def test_entries_that_were_not_equal_are_named() -> None:
    """One policy kept two entries too many of one of two prompts; the other one all that it should."""
    full, good, bad = rival("full", None), rival("good"), replace(rival("bad"), label="bad", policy=FastKV())
    records = [record(one, index) for index in (0, 1) for one in (full, good, bad)]
    records[-1] = replace(records[-1], kv_entries=records[-1].kv_entries + 2)
    text = render(records, [full, good, bad], 256)
    assert "every policy but full and those named here kept int(0.1 · N) entries" in text
    assert "of single prompts: bad +0.25 % (+0.00 % to +0.50 %).\n" in text


def test_nothing_to_tell_yet() -> None:
    full, tenth = rival("full", None), rival("tenth")
    assert render([record(full, 0)], [full, tenth], 256) == "No example has been answered by every policy yet.\n"
    single = [record(one, 0, decode_tokens_per_s=None) for one in (full, tenth)]
    assert [row[5:7] for row in rows(render(single, [full, tenth], 256))[2:]] == [["–", "–"]] * 2


# Pictures


@pytest.mark.parametrize("retentions", [(0.1,), (0.05, 0.2)])
def test_pictures(tmp_path: Path, retentions: tuple[float, ...]) -> None:
    """A heat map for each retention; all PNG files, and none of them blank."""
    image = pytest.importorskip("matplotlib.image")
    from fastkv.eval.compare.plots import draw, rows

    names = [f"policy{index}" for index in range(5)]
    rivals = [rival("full", None), *(rival(name, share) for share in retentions for name in names)]
    records = [
        record(one, 0, length, depth=depth, id=f"{length}/{depth}", ttft_s=0.1 + place / 100)
        for place, one in enumerate(rivals)
        for length in (500, 2000)
        for depth in (0.0, 1.0)
    ]
    paths = draw(records, rivals, 256, tmp_path / "new")
    maps = ["needle-archive.png"] if len(retentions) == 1 else [f"needle-archive-{r}.png" for r in (5, 20)]
    assert [path.name for path in paths] == ["comparison-archive.png", "accuracy-archive.png", *maps]
    assert all(image.imread(path)[..., :3].std() > 0.02 for path in paths)
    assert draw([], rivals, 256, tmp_path / "nothing") == []
    answers = [{one.label: record(one, 0, ttft_s=0.1 + place / 100) for place, one in enumerate(rivals)}]
    figure = rows(answers, rivals, 256)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["full", *names]
    at = [line.get_ydata()[0] for line in figure.axes[1].get_lines() if line.get_marker() == "o"]
    assert [round(row) for row in at] == [0, *list(range(1, 6)) * len(retentions)]
    assert len(set(at)) == len(at)
    first = [line.get_xdata()[0] for line in figure.axes[1].get_lines() if line.get_marker() == "o"]
    assert first == pytest.approx([0.1 + place / 100 for place in range(len(rivals))])
    kept = {round(line.get_xdata()[0], 6) for line in figure.axes[3].get_lines() if line.get_marker() == "o"}
    assert kept == {round(8 * int(share * 500) * 256 / 2**20, 6) for share in (1, *retentions)}


# The page


def test_a_page_of_its_own_and_again(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_page(path, "A title", "first\n", "page")
    assert path.read_text() == f"# A title\n\n{BEGIN}\n\nfirst\n\n{END}\n"
    write_page(path, "A title", "second", "page")
    assert path.read_text() == f"# A title\n\n{BEGIN}\n\nsecond\n\n{END}\n"


def test_what_is_around_the_marks_stays(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_bytes(f"Größe\r\n{BEGIN} old {END} behind".encode())
    check_page(path, "page")
    write_page(path, "A title", "new", "page")
    assert path.read_bytes() == f"Größe\r\n{BEGIN}\n\nnew\n\n{END} behind".encode()


@pytest.mark.parametrize("content", ["", "text", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_page_without_marks_is_not_overwritten(tmp_path: Path, content: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(content)
    with pytest.raises(FastKVError, match=r"page\.md: is there already, without one <!-- results -->"):
        check_page(path, "page")
    assert path.read_text() == content


def test_a_link_to_a_page_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.md").symlink_to(tmp_path / "page.md")
    write_page(tmp_path / "link.md", "A title", "first", "page")
    assert (tmp_path / "link.md").is_symlink()
    assert "first" in (tmp_path / "page.md").read_text()


def test_a_pipe_is_no_page(tmp_path: Path) -> None:
    """Reading one would wait for ever, and reading a device may never end."""
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(FastKVError, match=r"pipe\.md: cannot be written, for it is no ordinary file"):
        check_page(tmp_path / "pipe.md", "page")


def test_what_the_page_tells_of_the_run(tmp_path: Path) -> None:
    """Links go from the page to the pictures, and the command can be run again as it stands."""
    header = {"date": "2026-01-02", "model": "m", "device": "cpu", "dtype": "float32", "threads": 1}
    header |= {"fastkv": "0.1.0", "torch": "2.13.0"}
    argv = ["--model", "a model", "--length", "512", "1024", *(f"--policy=p{index}" for index in range(20)), "--quiet"]
    text = page_part(header, argv, "| t |\n", [tmp_path / "pictures of it" / "a.png"], tmp_path / "docs" / "page.md")
    assert text.startswith("Measured on 2026-01-02: m on cpu, float32, 1 thread, fastkv 0.1.0, torch 2.13.0.\n\n```\n")
    assert text.endswith("```\n\n![a](../pictures%20of%20it/a.png)\n\n| t |")
    command = text.split("```")[1]
    assert shlex.split(command.replace("\\\n", " ")) == ["fastkv-eval", "compare", *argv]
    assert max(map(len, command.splitlines())) <= 113
    assert "--length 512 1024" in command


def test_the_page_of_the_repository_has_its_marks() -> None:
    check_page(ROOT / "docs" / "comparison.md", "page")


# The command


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `fastkv-eval compare …`; exit status, stdout and stderr. {model} is the bundled model."""

    def run(line: str, **places: Any) -> tuple[int, str, str]:
        try:
            status: Any = cli.main(["compare", *line.format(model=MODEL, **places).split()])
        except SystemExit as left:  # the parser's own complaints
            status = left.code
        return (status, *capfd.readouterr())

    return run


SMALL = "--model {model} --dtype float32 --task archive --length 400 --depth 0.5 --examples 1"


def test_the_bundled_model(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Entries counted in the caches are equal; the page and the pictures are there; again, nothing is asked."""
    pytest.importorskip("matplotlib")
    line = SMALL + " --policy fastkv --policy adakv --policy pyramidinfer --kv-retention 0.1 0.2"
    line += " --output {at}/run.jsonl --plots {at}/plots --page {at}/page.md"
    status, out, err = command(line, at=tmp_path)
    assert status == 0
    assert err.splitlines()[-1] == f"wrote {tmp_path}/page.md"
    header, *records = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert [policy["name"] for policy in header["policies"]] == ["full", *["fastkv", "adakv", "pyramidinfer"] * 2]
    n_tokens = records[0]["prompt_tokens"]
    entries = [record["kv_entries"] for record in records]
    assert entries[0] == 16 * n_tokens
    for place, share in ((1, 0.1), (4, 0.2)):
        assert entries[place] == entries[place + 1] == 16 * int(share * n_tokens)
        assert entries[place + 2] == pytest.approx(16 * int(share * n_tokens), rel=0.02)
    page = (tmp_path / "page.md").read_text()
    assert out.strip() in page
    assert "![comparison-archive](plots/comparison-archive.png)" in page
    before = (tmp_path / "run.jsonl").read_bytes()
    again = command(line, at=tmp_path)
    assert again[:2] == (0, out)
    assert "continues after 7 records" in again[2]
    assert ((tmp_path / "run.jsonl").read_bytes(), (tmp_path / "page.md").read_text()) == (before, page)


def test_equal_reads_of_the_bundled_model(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The records say what was read; the pictures and the page say what was equal."""
    pytest.importorskip("matplotlib")
    line = SMALL + " --policy snapkv --policy quest:dense_layers=0 --policy rocketkv --read-retention 0.4"
    status, out, err = command(line + " --output {at}/run.jsonl --plots {at} --page {at}/page.md", at=tmp_path)
    assert (status, err.splitlines()[-1]) == (0, f"wrote {tmp_path}/page.md")
    _, full, *others = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert [one["read_bytes"] / full["read_bytes"] for one in others] == [pytest.approx(0.4, rel=0.1)] * 3
    assert "40 % of the KV cache read in a step: 1 example" in out
    assert (tmp_path / "page.md").read_text().startswith("# Every policy at equal bytes read in a step")


def test_all_policies_without_a_table_of_heads(command: Callable[..., tuple[int, str, str]]) -> None:
    """headkv and dbudget are left out with one line each, on stderr and below the tables."""
    status, out, err = command(SMALL)
    assert (status, err) == (0, f"headkv is left out: it needs --head-scores FILE\n{NO_BUDGET}\n")
    named = [row[0] for row in rows(out)[2:]]
    assert named == ["full", *(name for name in EQUAL if name not in ("full", "headkv"))]
    assert out.endswith(err.replace("\n", "\n\n", 1))


def test_a_run_that_is_interrupted_writes_no_page(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    status, out, err = command(SMALL + " --policy fastkv --page {at}/page.md --output {at}/run.jsonl", at=tmp_path)
    assert (status, out) == (130, "No example has been answered by every policy yet.\n")
    assert err.startswith("interrupted with 2 answers to go: the same command continues in ")
    assert not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--task archive", "--model"),
        ("--model {model} --task archiv", "--task: task must be one of"),
        ("--model {model} --task longbench", "--task: task must be one of"),
        ("--model {model} --task archive --kv-retention 0", "--kv-retention 0: must be above 0 and below 1"),
        ("--model {model} --task archive --kv-retention 0.1 1", "--kv-retention 1: must be above 0 and below 1"),
        (
            "--model {model} --task archive --read-retention 0.2 --kv-dtype int8",
            "--read-retention compares entries in",
        ),
        ("--model {model} --task archive --read-retention 0.2 1", "--read-retention 1: must be above 0 and below 1"),
        ("--model {model} --task archive --read-retention 0.2 --kv-retention 0.2", "not allowed with"),
        ("--model {model} --task archive --kv-retention nan", "--kv-retention nan: must be"),
        ("--model {model} --task archive --policy snap", "--policy snap: policy must be one of fastkv"),
        ("--model {model} --task archive --policy fastkv:a", "--policy fastkv:a: must be NAME or NAME:setting=value"),
        ("--model {model} --task archive --policy fastkv --head-scores x", "--head-scores is for a policy that reads"),
        (
            "--model {model} --task archive --head-scores no/such",
            "--policy headkv: head_scores no/such: cannot be read",
        ),
        ("--model {model} --task archive --policy full", "--policy: there is nothing to compare"),
        ("--model {model} --task archive --policy fastkv:kv_len=9", "kv_len is what makes the policies keep the same"),
        ("--model {model} --task archive --page no/such/page.md", "--page: no/such/page.md: cannot be written"),
        ("--model {model} --task archive --page no.md --output no.md", "is the file of --output"),
        ("--model {model} --task archive --page README.md", "--page: README.md: is there already, without one"),
        ("--model {model} --task archive --page {model}/model.safetensors", "model.safetensors: is not UTF-8"),
        (
            "--model {model} --task archive --page {model}",
            "--page: {model}: cannot be written, for it is no ordinary file",
        ),
        ("--model {model} --task archive --output no/such/run.jsonl", "--output: no/such/run.jsonl: cannot be written"),
        ("--model {model} --task archive --plots README.md", "--plots: README.md: is no folder"),
        ("--model {model} --task archive --plots README.md/new", "--plots: README.md/new: README.md is no folder"),
        ("--model {model} --task archive --examples 0", "--examples: examples must be"),
        ("--model {model} --task archive --length 256 --max-tokens 9000", "--max-tokens: an answer of 9000 tokens"),
        ("--model {model} --task archive --length 8190", "--length: 8190 tokens and an answer of 8"),
        ("--model {model} --task vt --qa-file x", "--qa-file is for --task qa"),
        ("--model no/such/folder", "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    monkeypatch.chdir(ROOT)
    status, out, err = command(line)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("fastkv-eval: error: ")
    assert says.replace("{model}", MODEL) in err
