"""torch.compile changes how fast the layers run, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkv import LLM, FastKV, FastKVError, SamplingParams
from fastkv.engine import compile as module
from fastkv.engine.compiled_row import CompiledRow
from fastkv.models.layers import Rope

PROMPT = torch.randint(3, 256, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """The C++ around the kernels is compiled as it is, which takes a third of the time; no kernel is made otherwise."""
    import torch._inductor.config as config

    with config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        yield


@pytest.mark.usefixtures("quick_compiler")
def test_compiled_layers_give_the_eager_logits_and_tokens(tiny_llm: LLM, tiny_folder: Path) -> None:
    try:
        llm = LLM(tiny_folder, dtype="float32", device="cpu", compile=True)
    except FastKVError as error:
        pytest.skip(str(error))
    policy, params = FastKV(min_tokens=8), SamplingParams(max_tokens=6, ignore_eos=True)
    expected, found = tiny_llm.prefill(PROMPT, policy), llm.prefill(PROMPT, policy)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(found.kept, expected.kept, strict=True))
    assert llm.generate(PROMPT, params, policy).token_ids == tiny_llm.generate(PROMPT, params, policy).token_ids
    row = llm.model.row
    assert isinstance(row, CompiledRow)
    assert not row._failed
    assert len(row._compiler._codes) == 3  # before the first attention, between two, after the last one
    # Another process takes the code as it is, and imports no compiler.
    command = [sys.executable, "-c", TOKENS, str(tiny_folder), json.dumps(PROMPT)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [str(tiny_llm.generate(PROMPT, params, policy).token_ids), "[]"]


TOKENS = """
import json, sys
from fastkv import LLM, FastKV, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", device="cpu", compile=True)
params = SamplingParams(max_tokens=6, ignore_eos=True)
print(llm.generate(json.loads(sys.argv[2]), params, FastKV(min_tokens=8)).token_ids)
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_what_lies_between_two_attentions_is_one_graph_for_all_layers(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, with no break, and the same for every step. The compiler is left out: it does not change the graph."""
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = tiny_llm.model
    prefill = [tiny_llm.prefill(PROMPT, FastKV(min_tokens=8)) for _ in range(2)]
    ids = torch.tensor([[5], [6], [7]])
    expected = [tiny_llm.decode(prefill[0].cache, token) for token in ids]
    compiled = torch.compile(module._between, backend=kept, fullgraph=True, dynamic=False)
    calls: list[int] = []

    def counted(layer: int, hidden: Tensor, attended: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(layer)
        return compiled(hidden, model.blocks[layer], model.blocks[layer + 1], attended, rope)

    monkeypatch.setattr(model, "between", counted)
    found = [tiny_llm.decode(prefill[1].cache, token) for token in ids]
    assert calls == 3 * list(range(tiny_llm.config.n_layers - 1))
    assert len(graphs) == 1
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_one_line_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("\nno g++ found\nand a page of advice")

    monkeypatch.setattr(module.torch, "compile", broken)
    with pytest.raises(FastKVError, match=r"needs a C\+\+ compiler such as g\+\+ \(no g\+\+ found\)") as caught:
        LLM(tiny_folder, device="cpu", compile=True)
    assert caught.value.setting == "compile"


def test_a_compiler_that_is_gone_is_no_error_where_code_was_kept(
    tiny_llm: LLM, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch needs what is not kept: it runs uncompiled, and says so once."""

    def gone(device: torch.device) -> None:
        raise FastKVError("torch.compile does not work here", setting="compile")

    module._warn_once.cache_clear()
    monkeypatch.setattr(module, "anything_kept", lambda: True)
    monkeypatch.setattr(module, "_check_compiler", gone)
    monkeypatch.setattr(module.CompiledRow, "prepare", lambda *_, **named: None)
    llm = LLM(tiny_folder, dtype="float32", device="cpu", compile=True)
    params, prompts = SamplingParams(max_tokens=4, ignore_eos=True), [PROMPT, PROMPT[:100]]
    expected, found = (each.generate(prompts, params, FastKV(min_tokens=8)) for each in (tiny_llm, llm))
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert (
        caplog.text.count("going on without: torch.compile does not work here") == 1
    )  # between layers, after the last
