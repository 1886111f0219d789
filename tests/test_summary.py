"""The policy, device and dtype that an output tells are those it ran with, not those of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastkv import LLM, FastKV, FullKV, GemFilter, Output, SamplingParams
from fastkv.console.summary import as_json, figures
from fastkv.report.data import report_of

IDS = list(range(40))
PARAMS = SamplingParams(max_tokens=2)
SMALL = FastKV(tsp_len=20, kv_len=12)


def streamed(llm: LLM, policy: FastKV) -> Output:
    stream = llm.stream(IDS, PARAMS, policy)
    list(stream)
    return stream.output()


@pytest.mark.parametrize(
    "run",
    [
        lambda llm, policy: llm.generate(IDS, PARAMS, policy),
        lambda llm, policy: llm.generate([IDS, IDS], PARAMS, policy)[1],
        streamed,
    ],
    ids=["one", "batch", "stream"],
)
def test_the_policy_of_a_call_travels_with_its_output(tiny_llm: LLM, run: Any) -> None:
    """The model's own policy is another one, and may be exchanged before anybody asks."""
    assert tiny_llm.policy == FastKV()
    output = run(tiny_llm, SMALL)
    settings = SMALL.settings(tiny_llm.config.n_layers)
    assert settings["tsp_layer"] == 2  # the default, worked out
    assert (output.run.policy, output.run.settings) == ("fastkv", settings)
    assert (output.run.device, output.run.dtype) == ("cpu", "float32")
    printed = as_json(output)
    assert printed["policy"] == {"name": "fastkv", **settings}
    assert (printed["device"], printed["dtype"]) == ("cpu", "float32")


def test_figures_are_of_the_policy_of_the_call(tiny_llm: LLM) -> None:
    rows = dict(figures(tiny_llm.generate(IDS, PARAMS, FullKV())))
    assert rows["policy"] == "full, on cpu in float32"
    assert "TSP" not in rows
    rows = dict(figures(tiny_llm.generate(IDS, PARAMS, GemFilter(filter_layer=1, kv_len=10))))
    assert rows["first pass"] == "10 tokens (25.0 %) chosen at layer 1, then read anew"


def test_a_report_is_of_the_policy_of_the_call(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream(IDS, PARAMS, FullKV(), keep_selection=True)
    list(stream)
    assert stream.selection is not None
    report = report_of(tiny_llm, IDS, *stream.selection, stream.output())
    assert report.policy == "full"
    assert dict(report.figures)["policy"].startswith("full, ")


def test_the_library_writes_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    LLM(tiny_folder, device="cpu").generate(IDS, PARAMS)
    assert capfd.readouterr() == ("", "")
