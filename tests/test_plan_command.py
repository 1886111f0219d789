"""fastkv-plan: the answer comes first, every flag counts, what to change is true, and mistakes are one line."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from fastkv.cache.catalogue import POLICIES, SETTINGS
from fastkv.console.plan import command, machine
from fastkv.console.plan.changes import longest
from fastkv.console.plan.command import main
from fastkv.console.plan.flags import NAMED_SETTINGS, build_parser, tokens
from fastkv.console.plan.model import shape_of
from fastkv.console.plan.text import seconds_text
from fastkv.console.policy_file import remember
from fastkv.engine.planning.ceilings import Ceilings
from fastkv.engine.planning.planned import Wanted, planned
from fastkv.errors import FastKVError
from fastkv.models.files import fingerprint
from fastkv.models.presets import PRESETS

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit status, stdout and stderr of the command."""

    def call(*argv: str) -> tuple[int, str, str]:
        try:
            status: Any = main(list(argv))
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def plan(run: Call) -> Callable[..., dict[str, Any]]:
    """The object of --json, of llama-100m and a prompt of 16K, unless flags say otherwise."""

    def call(*argv: str) -> dict[str, Any]:
        status, out, err = run("--model", "llama-100m", "--context", "16K", "--json", *argv)
        assert (status, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    return call


SMALL = ("--memory", "0.5")  # GiB


def test_the_answer_comes_first(run: Call) -> None:
    status, out, err = run("--model", "llama-100m", "--context", "16K")
    assert (status, err) == (0, "")
    first, *rest = out.splitlines()
    assert first == "fits: one GPU (h200) needs 0.6 GiB of 140.4 GiB".replace("0.6 GiB", first.split(" needs ")[1][:9])
    labels = [line[:12].strip() for line in rest]
    assert labels[: labels.index("")] == [
        "request", "memory", "of that", "first token", "decode", "times", "limited"
    ]  # fmt: skip
    assert "not measured" not in first
    assert "what was measured on one H200" in out


def test_what_does_not_fit_is_an_answer(run: Call) -> None:
    asked = ("--model", "llama-100m", "--context", "64K", "--policy", "full", *SMALL)
    status, out, err = run(*asked)
    assert (status, err) == (0, "")
    assert out.startswith("does not fit: one GPU (h200) needs ")
    assert " of 512.0 MiB\n" in out
    assert run(*asked, "--check")[0] == 1
    assert run(*asked[:2], "--context", "16K", "--check")[0] == 0


def test_what_fits_by_less_than_the_figures_are_off_by_is_told(plan: Callable[..., Any], run: Call) -> None:
    needed = plan()["needed_bytes"] / 2**30
    for memory, starts, narrow in ((1.05, "fits narrowly: ", True), (1.2, "fits: ", False), (0.99, "does not", False)):
        given = ("--memory", str(needed * memory))
        assert run("--model", "llama-100m", "--context", "16K", *given)[1].startswith(starts)
        assert plan(*given)["narrow"] == narrow


def test_every_part_of_the_memory_is_told(plan: Callable[..., Any]) -> None:
    found = plan("--policy", "kvzip")
    assert sum(found["memory_bytes"].values()) == found["needed_bytes"]
    assert sum(found["working_bytes"].values()) == found["memory_bytes"]["working memory"]
    assert found["working_bytes"]["K and V of all layers until the policy chooses"] > 0
    assert sum(found["first_token_parts_s"].values()) == found["first_token_s"]
    assert sum(found["step_parts_s"].values()) == found["step_s"] == 1 / found["tokens_per_s"]


@pytest.mark.parametrize(("flags", "smaller"), [
    (("--kv-dtype", "int8"), "KV cache"),
    (("--kv-retention", "0.05"), "KV cache"),
    (("--weights", "int8"), "weights"),
    (("--gpus", "2"), "weights"),
    (("--context", "8K"), "working memory"),
    (("--max-tokens", "8", "--decode-budget", "64"), "KV cache"),
])  # fmt: skip
def test_every_flag_counts(plan: Callable[..., Any], flags: tuple[str, ...], smaller: str) -> None:
    assert plan(*flags)["memory_bytes"][smaller] < 0.9 * plan("--max-tokens", "4096")["memory_bytes"][smaller]


def test_several_prompts_have_a_cache_each(plan: Callable[..., Any]) -> None:
    one, four = plan(), plan("--batch", "4")
    assert four["memory_bytes"]["KV cache"] == 4 * one["memory_bytes"]["KV cache"]
    assert four["first_token_s"] == one["first_token_s"]
    assert one["tokens_per_s"] < four["tokens_per_s"] < 4 * one["tokens_per_s"]


# --- what to change ---


def test_what_a_change_brings_is_what_a_plan_with_it_says(plan: Callable[..., Any]) -> None:
    found = plan("--batch", "2", "--memory", "0.4")
    assert not found["fits"]
    flags = [each["flags"] for each in found["changes"]]
    assert flags == [
        "--gpus 2", "--kv-retention 0.05", "--kv-dtype int8", "--weights int8", "--batch 1", "--context 8K"
    ]  # fmt: skip
    for each in found["changes"]:
        other = plan("--batch", "2", "--memory", "0.4", *each["flags"].split())
        keys = ("fits", "needed_bytes", "first_token_s", "tokens_per_s")
        assert {key: other[key] for key in keys} == {key: each[key] for key in keys}


def test_a_full_cache_is_told_of_fastkv_and_of_gpus_that_are_enough(plan: Callable[..., Any]) -> None:
    asked = ("--context", "1M", "--policy", "full", "--memory", "10")
    changes = {each["flags"]: each["fits"] for each in plan(*asked)["changes"]}
    assert changes["--gpus 2"] is False
    assert changes["--policy fastkv"] is changes["--gpus 4"] is True


def test_nothing_is_told_to_change_into_what_it_is(plan: Callable[..., Any]) -> None:
    """Of 100 tokens FastKV drops none, as a full cache does."""
    for policy in ("fastkv", "full"):
        flags = [each["flags"] for each in plan("--context", "100", "--policy", policy)["changes"]]
        assert flags == ["--gpus 2", "--kv-dtype int8", "--weights int8"]


def test_the_longest_prompt_that_fits_fits(plan: Callable[..., Any], run: Call) -> None:
    """To the token, with an answer of the length that was asked for; and it is said why no longer one does."""
    most = plan(*SMALL)["longest_context"]
    assert plan(*SMALL, "--context", str(most))["fits"]
    assert not plan(*SMALL, "--context", str(most + 1))["fits"]
    assert plan("--memory", "0.1")["longest_context"] is None
    asked = ("--model", "llama-100m", "--context", "16K")
    assert f"--context {most}, by the memory; narrowly\n" in run(*asked, *SMALL)[1]
    whole = 2**21 - 100
    assert plan("--context", str(whole), "--max-tokens", "100")["longest_context"] == whole
    assert plan("--max-tokens", "1024")["longest_context"] == 2**21 - 1024
    assert "--context 2047K, by the model's context\n" in run(*asked, "--max-tokens", "1024")[1]
    assert run("--model", "llama-100m", "--context", str(whole + 1), "--max-tokens", "100")[0] == 2


def test_a_sliding_window_is_told_where_it_is_what_ends_a_prompt() -> None:
    config = replace(PRESETS["llama-100m"], sliding_windows=(4096,) * 12, context_length=8192)
    device = torch.device("cuda")
    dropping, whole = (
        planned(Wanted(config, POLICIES[name](), 2048, torch.bfloat16, device, 100)) for name in ("fastkv", "full")
    )
    assert longest(dropping, 2**40) == (4096 - 100, "the model's sliding_window", False)
    assert longest(whole, 2**40) == (8192 - 100, "the model's context", False)


def test_what_makes_nothing_better_is_not_told(plan: Callable[..., Any]) -> None:
    """Half of what rocketkv keeps, of more entries that are looked at, takes more memory and no known time less."""
    asked = ("--model", "llama-3.1-8b", "--context", "32K", "--policy", "rocketkv")
    worse = plan(*asked, "--kv-retention", "0.5")
    now = plan(*asked)
    assert worse["needed_bytes"] > now["needed_bytes"]
    assert worse["first_token_s"] == now["first_token_s"]
    assert [each["flags"] for each in now["changes"]] == ["--gpus 2", "--weights int8", "--context 16K"]


def test_changes_that_fit_narrowly_say_so(plan: Callable[..., Any], run: Call) -> None:
    """Those that fit with room first; the same is said of --offload."""
    asked = ("--context", "64K", "--policy", "full")
    needed = {each["flags"]: each["needed_bytes"] for each in plan(*asked)["changes"]}["--kv-dtype int8"]
    given = (*asked, "--memory", str(1.01 * needed / 2**30))
    changes = {each["flags"]: (each["fits"], each["narrow"]) for each in plan(*given)["changes"]}
    assert changes["--kv-dtype int8"] == (True, True)
    assert changes["--policy fastkv"] == (True, False)
    assert changes["--weights int8"] == (False, False)
    text = run("--model", "llama-100m", *given)[1]
    ends = re.findall("^--[a-z0-9 -]+ [0-9.]+ [GM]iB(, fits narrowly|, does not fit)?", text, re.MULTILINE)
    assert ends == sorted(ends, key=["", ", fits narrowly", ", does not fit"].index)
    assert set(ends) == {"", ", fits narrowly", ", does not fit"}
    asked = ("--context", "1M", "--memory")
    needed = plan(*asked, "5")["offload"]["device_bytes"] / 2**30
    for memory, narrow, told in ((1.05, True, "fits narrowly: "), (1.2, False, "fits: ")):
        given = (*asked, str(memory * needed))
        assert plan(*given)["offload"]["narrow"] == narrow
        assert f"with --offload it {told}" in run("--model", "llama-100m", *given)[1]


def test_what_offloading_would_need_is_told_where_it_helps(plan: Callable[..., Any], run: Call) -> None:
    asked = ("--context", "1M", "--memory", "5")
    found = plan(*asked)
    assert not found["fits"]
    assert found["offload"]["device_bytes"] <= found["device_bytes"]
    assert found["offload"]["host_bytes"] >= 2**20 * (768 + 2 * 4 * 64) * 2
    assert "with --offload it fits: " in run("--model", "llama-100m", *asked)[1]
    assert plan()["offload"] is None
    assert plan("--memory", "0.1")["offload"] is None
    several = ("--context", "1M", "--memory", "3", "--gpus", "2")
    assert not plan(*several)["fits"]
    assert plan(*several)["offload"] is None  # it is refused there


# --- models, policies, machines ---


def test_a_folder_with_a_config_is_enough(plan: Callable[..., Any], tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    alone, whole = (plan("--model", str(f), "--context", "1K", "--dtype", "float32") for f in (tmp_path, tiny_folder))
    assert {**alone, "model": ""} == {**whole, "model": ""}
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("torch_dtype", None), content.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(FastKVError, match=r"config\.json does not say the dtype"):
        shape_of(str(tmp_path), None).dtype("auto", torch.device("cuda"))


def test_a_hub_id_is_found_where_it_is_here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    with pytest.raises(FastKVError, match="a plan downloads nothing"):
        shape_of("some/model", None)
    shutil.copy(tiny_folder / "config.json", folder / "snapshots" / "abc")
    assert shape_of("some/model", None).config.n_layers == 6
    with pytest.raises(FastKVError, match="a plan downloads nothing"):
        shape_of("some/model", "other")


def test_the_policy_is_the_one_that_fastkv_run_takes(
    plan: Callable[..., Any], run: Call, archive_folder: Path, tmp_path: Path
) -> None:
    content = {
        "date": "2026-11-27",
        "files": fingerprint(archive_folder),
        "policy": "snapkv",
        "settings": {"kv_len": 64},
    }
    asked = ("--model", str(archive_folder), "--context", "512")
    assert plan(*asked)["policy"]["name"] == "fastkv"
    remembered = remember(content)
    assert plan(*asked)["policy"] == {**plan(*asked, "--policy", "snapkv")["policy"], "kv_len": 64}
    assert plan(*asked, "--policy", "full")["policy"] == {"name": "full"}
    file = ("--policy-file", str(remembered))
    assert plan(*file, "--kv-len", "128")["policy"]["kv_len"] == 128  # of a preset: there are no files to compare
    remembered.write_text(json.dumps({"kind": "fastkv-policy", **content, "files": "0" * 16}))
    assert "was made for another model" in run(*asked, *file)[2]
    assert run(*asked, *file, "--policy", "full")[2].startswith("fastkv-plan: error: --policy-file names a policy")


def test_this_machine_may_be_measured(plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2**30)
    unknown = plan("--device", "cpu", "--dtype", "float32")
    assert (unknown["first_token_s"], unknown["step_s"], unknown["device_bytes"]) == (None, None, 2**30)
    assert "add --measure" in unknown["not_known"][0]
    monkeypatch.setattr(machine, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e11))
    monkeypatch.setattr(machine, "measure_layer", lambda device, dtype: 0.5)
    measured = plan("--device", "cpu", "--dtype", "float32", "--measure")
    given = plan("--device", "cpu", "--dtype", "float32", "--flops", "1", "--bandwidth", "100")
    for key in ("first_token", "step"):
        parts = measured[f"{key}_parts_s"]
        assert parts.pop("small kernels") == 12 * 0.5
        assert parts == given[f"{key}_parts_s"]
    assert measured["limits"]["decode"]["part"] == "small kernels"
    assert set(given["limits"]) == {"memory"}
    assert not any("what each layer costs" in note for note in (*measured["notes"], *unknown["notes"]))
    assert any("without what each layer costs besides" in note for note in given["notes"])
    assert plan("--device", "cpu", "--dtype", "float32", "--gpus", "2")["device_bytes"] == 2**29


def test_figures_given_take_the_place_of_the_machines(plan: Callable[..., Any]) -> None:
    usual = plan("--gpus", "2")
    faster = plan("--gpus", "2", "--bandwidth", "8466", "--link", "900", "--link-latency", "5", "--memory", "80")
    assert faster["device_bytes"] == 80 * 2**30
    for name, times in (("weights", 2), ("entries", 2), ("all-reduces", 2), ("small kernels", 1)):
        assert usual["step_parts_s"][name] == pytest.approx(times * faster["step_parts_s"][name], rel=1e-3)
    for name, times in (("products", 2), ("attention", 2), ("small kernels", 1)):
        half, whole = (plan(*given)["first_token_parts_s"][name] for given in (("--flops", "387"), ()))
        assert half == pytest.approx(times * whole, rel=1e-3)
    assert plan("--dtype", "float32")["first_token_s"] is None
    assert plan("--dtype", "float32", "--flops", "60")["first_token_s"] > 0
    assert faster["source"]["told"].endswith("with --memory, --bandwidth, --link, --link-latency as given")


@pytest.mark.parametrize(("seconds", "told"), [
    (1234.5, "1,234 s"), (99.96, "100 s"), (56.78, "56.8 s"), (9.996, "10.0 s"), (1.349, "1.35 s"), (0.9996, "1.00 s"),
    (0.9994, "999 ms"), (0.139, "139 ms"), (0.0119, "11.9 ms"), (3.65e-5, "0.036 ms"), (1e-7, "under 0.001 ms"),
])  # fmt: skip
def test_times_have_three_digits(seconds: float, told: str) -> None:
    assert seconds_text(seconds) == told


# --- flags ---


def test_lengths_are_read_as_people_write_them() -> None:
    assert [tokens(text) for text in ("131072", "128K", "128k", "1M")] == [2**17, 2**17, 2**17, 2**20]
    for text in ("", "0", "K", "1.5M", "-1", "1G", "1 K", "٣", "9" * 13):
        with pytest.raises(Exception, match="takes a number of tokens"):
            tokens(text)


def test_every_setting_of_a_policy_is_a_flag_and_named() -> None:
    flags = {action.dest for action in build_parser()._actions}
    assert set(SETTINGS) <= flags
    assert flags - NAMED_SETTINGS == {"help", "version", "model", "measure", "check", "json"}
    assert flags >= NAMED_SETTINGS


@pytest.mark.parametrize(("flags", "complaint"), [
    (("--model", "none"), "none: no such folder and no preset; presets are llama-3.1-70b, "),
    (("--model", "no/such"), "no/such: no such folder, and no config.json"),
    (("--context", "4M"), "the prompt has 4194304 tokens, but the model's context"),
    (("--context", "1.5M"), "argument --context: takes a number of tokens"),
    (("--gpus", "3"), "--gpus: 3 ranks cannot share 4 KV heads (num_key_value_heads) equally; take 2 or 4"),
    (("--gpus", "0"), "--gpus: gpus must be a whole number of at least 1"),
    (("--batch", "0"), "--batch: batch must be a whole number of at least 1"),
    (("--max-tokens", "0"), "--max-tokens: max_tokens must be"),
    (("--policy", "best"), "--policy: policy must be one of fastkv, "),
    (("--policy", "full", "--kv-len", "9"), "--kv-len is no setting of --policy full"),
    (("--tsp-layer", "99"), "--tsp-layer: "),
    (("--decode-budget", "3"), "--decode-budget: "),
    (("--weights", "int4"), "--weights: weights must be one of int8"),
    (("--kv-dtype", "int2"), "--kv-dtype: kv_dtype must be one of int8, int4"),
    (("--kv-dtype", "int8", "--policy", "quest"), "--kv-dtype: kv_dtype does not go with policy quest"),
    (("--dtype", "int8"), "--dtype: dtype must be one of auto, "),
    (("--device", "h100"), "--device: must be h200, or cpu or cuda for this machine, not h100; for another GPU give"),
    (("--device", "cpu:1"), "--device: device must be auto, cpu, cuda or cuda:N"),
    (("--measure",), "--measure is for this machine: add --device cpu"),
    (("--memory", "0"), "--memory: memory must be a number above 0"),
    (("--flops", "nan"), "--flops: flops must be a number above 0"),
    (("--device", "cpu", "--link-latency", "3"), "--link-latency goes with --link"),
    (("--revision", "main"), "--revision: is for hub ids, and llama-100m is a preset"),
    (("--policy-file", "none.json"), "--policy-file: none.json: "),
    (("--threads", "0"), "--threads: threads must be"),
    (("--device", "\udcff"), "--device: is not UTF-8"),
])  # fmt: skip
def test_mistakes_are_one_line(run: Call, flags: tuple[str, ...], complaint: str) -> None:
    status, out, err = run("--model", "llama-100m", "--context", "16K", *flags)
    assert (status, out) == (2, "")
    assert err.startswith(f"fastkv-plan: error: {complaint}"), err
    assert len(err.splitlines()) == 1


def test_check_needs_to_know_the_memory(run: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    asked = ("--model", "llama-100m", "--context", "16K", "--device", "cpu", "--dtype", "float32")
    assert run(*asked)[1].startswith("this machine needs ")
    status, out, err = run(*asked, "--check")
    assert (status, out) == (2, "")
    assert err == "fastkv-plan: error: --check: how much memory there is is not known: give --memory\n"


def test_the_page_shows_what_the_commands_print(run: Call, benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    shown = re.search(r"^fastkv-plan (.*)$", page, re.MULTILINE)
    assert shown is not None
    assert f"```\n{run(*shown[1].split())[1]}```" in page
    benchmarks.plan_times.main()
    assert capsys.readouterr().out in page


def test_the_name_of_the_command() -> None:
    assert build_parser().prog == command.NAME == "fastkv-plan"


def test_the_file_is_a_command_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fastkv-plan", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(command.__file__), run_name="__main__")
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("fastkv-plan ")
