"""Models that tests run on. Those that the repository does not hold are looked for beside it, and skipped if absent."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from places import OUTSIDE_MODELS, ROOT
from torch import Tensor

from fastkv import LLM
from fastkv.engine import memory
from fastkv.kernels import calibration, direct, int8, limits, products, row_attention
from fastkv.kernels.recording import recorded

# A shell that starts `make test &` lets Ctrl-C be ignored, and what we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Small models are fastest on one thread, and two threads on a busy machine can be many times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
# For fixtures that outlive a test; nothing is ever there.
os.environ["FASTKV_CACHE"] = str(Path(tempfile.gettempdir(), f"fastkv-tests-{os.getpid()}"))
os.environ["FASTKV_CALIBRATION"] = "off"  # what is measured differs from run to run; tests of it stand in for the clock
_counter = itertools.count()
_scripts: dict[str, ModuleType] = {}  # of benchmarks/
_MOUNT = limits.MOUNT

# What takes longest, the first of all first: begun last, one of them would run alone when all else is done.
LONGEST = (
    "test_batch_ray.py",
    "test_compile.py",
    "test_compiled_row.py",
    "test_benchmarks.py",
    "test_policies.py",
    "test_cli.py",
    "test_caches.py",
    "test_folders.py",
    "test_families.py",
    "test_hub.py",
    "test_speculation.py",
    "test_report_browser.py",
    "test_eval_compare.py",
    "test_decode_budget.py",
    "test_eval_tsp_layers.py",
    "test_cli_errors.py",
    "test_train.py",
    "test_footprint.py",
    "test_batch.py",
    "test_walkthrough.py",
    "test_tokenizer.py",
    "test_chat_command.py",
    "test_weights.py",
    "test_ranks.py",
    "test_torchrun.py",
    "test_offload.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's commands remember things: a folder of its own that is not there yet, never the user's."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_counter)}"
    monkeypatch.setenv("FASTKV_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def clock_of_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way takes the same time, and none was chosen by an earlier test: no choice depends on machine or order."""
    monkeypatch.setattr(calibration, "_clock", lambda: 0.0)
    for chosen in (products, int8, row_attention):
        chosen.forget()


_left = cache(limits.left)
_heap_free = cache(limits.heap_free)


@pytest.fixture(autouse=True)
def memory_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system leaves to this process: every request asks, and to read it takes as long as a decode step.

    Where a test puts other files in place of the system's, they are read.
    """

    def left() -> limits.Left | None:
        return _left() if limits.MOUNT is _MOUNT else limits.left()

    def heap_free() -> int:
        return _heap_free() if limits.MOUNT is _MOUNT else limits.heap_free()

    monkeypatch.setattr(memory, "limits", SimpleNamespace(left=left, heap_free=heap_free))


@pytest.fixture
def stand_in_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """In place of torch's: the graphs that it was given. A library holds the number of one, and runs it."""
    graphs: list[Any] = []

    def built(graph: Any, examples: Sequence[Tensor], options: dict[str, Any]) -> Path:
        assert len(examples) == sum(node.op == "placeholder" for node in graph.graph.nodes)
        assert not any(node.op == "get_attr" for node in graph.graph.nodes)  # no layer's weights stay in it
        graphs.append(SimpleNamespace(graph=graph, runs=0))
        library = tmp_path / f"{len(graphs)}.so"
        library.write_text(str(len(graphs) - 1))
        return library

    def loaded(library: Path) -> Callable[[list[Tensor]], list[Tensor]]:
        mine = graphs[int(library.read_text())]

        def run(inputs: list[Tensor]) -> list[Tensor]:
            mine.runs += 1
            return list(mine.graph(*inputs))

        return run

    monkeypatch.setattr(direct, "_built", built)
    monkeypatch.setattr(direct, "_loaded", loaded)
    return graphs


_traces: dict[Any, Any] = {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of a function is the same in every test, and takes half a second a part.

    Told apart by everything that the function calls, as the code that is kept is, and by the sizes that it was given.
    """
    traced = direct._traced

    def remembered(function: Any, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        key = recorded(function, inputs)[0]
        if key not in _traces:
            _traces[key] = traced(function, inputs, weights)
        return _traces[key]

    monkeypatch.setattr(direct, "_traced", remembered)


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """For a test that changes what a trace says of its sizes."""
    others = dict(_traces)
    _traces.clear()
    yield
    _traces.clear()
    _traces.update(others)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """Random weights, 6 layers, 4 query / 2 KV heads, llama3 rotary scaling, no tokenizer."""
    return ROOT / "tests" / "data" / "tiny-gqa"


@pytest.fixture(scope="session")
def archive_folder() -> Path:
    """The bundled example's model, with a tokenizer.json."""
    return ROOT / "examples" / "archive" / "model"


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """A real small model with a tokenizer.model; not part of the repository."""
    folder = OUTSIDE_MODELS / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (FASTKV_TEST_MODELS names the folder that holds it)")
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def archive_llm(archive_folder: Path) -> LLM:
    return LLM(archive_folder, dtype="float32", device="cpu")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/, which is a folder of scripts and no package; imported once, hidden between tests."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = [path.stem for path in (ROOT / "benchmarks").glob("*.py")]
    sys.modules.update(_scripts)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    _scripts.update({name: sys.modules.pop(name) for name in names})
