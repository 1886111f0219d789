"""Compiled code that is called directly, and kept on disk: torch's compiler without the look-up of torch.compile.

At each call torch.compile looks up which of its compiled code fits, by everything that the function has read. For a
layer of a small model that takes as long as its attention. Here it is done once for each function: those that do the
same operations on other weights share their code (recording.py). A call compares the sizes of its inputs, and nothing
else. The code is a shared library of torch's ahead-of-time compiler, in the user's cache folder: a later process needs
no compiler, and does not even import it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkv.kernels.calibration import cpu_flags, cpu_name
from fastkv.kernels.kept_code import FORMAT, keep, kept
from fastkv.kernels.recording import Function, recorded
from fastkv.kernels.size_conditions import Sizes, read_condition
from fastkv.kernels.tracing import GRAPH, recorded_as

_log = logging.getLogger(__name__)
_LOCK = threading.Lock()  # while one thread compiles, torch tells the others that they are compiled, too

_MOST_SIZES = 10_000  # that are remembered; a sequence that grows has new ones with each token

Run = Callable[[list[Tensor]], list[Tensor]]  # the inputs and the weights -> the outputs


class DirectCode:
    """Compiled code of a function. run: (inputs and weights, as one list) -> the outputs."""

    def __init__(self, run: Run, sizes: Sizes) -> None:
        self.run = run
        self._open = {place: list(each) for place, each in sizes.open.items()}
        self._condition = read_condition(sizes.condition)
        self._known: dict[Any, bool] = {}

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the code holds for inputs of these sizes."""
        sizes = tuple([(inputs[place].shape, inputs[place].stride()) for place in self._open])
        known = self._known.get(sizes)
        if known is None:
            if len(self._known) > _MOST_SIZES:
                self._known.clear()
            known = self._known[sizes] = self._compare(inputs)
        return known

    def _compare(self, inputs: Sequence[Tensor]) -> bool:
        for place, expected in self._open.items():
            there = (*inputs[place].shape, *inputs[place].stride())
            if len(there) != len(expected) or any(e not in (None, t) for e, t in zip(expected, there, strict=True)):
                return False
        return self._condition(inputs)


class DirectCompiler:
    """Compiles functions, each kind once. options: of torch's compiler."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._codes: dict[str, DirectCode] = {}

    def compiled(self, function: Function, inputs: Sequence[Tensor]) -> tuple[DirectCode, list[Tensor]]:
        """The code for a function, and the weights to call it with after the inputs. The function runs once.

        It holds for inputs like these, in dtype and dimensions; sizes other than 1 may change as far as the function
        leaves them open. An input that it changes must share no memory with another one. Raises whatever torch raises
        where it cannot be done.
        """
        with _LOCK:
            return self._compiled(function, inputs)

    def _compiled(self, function: Function, inputs: Sequence[Tensor]) -> tuple[DirectCode, list[Tensor]]:
        operations, weights = recorded(function, inputs)
        kind = hashlib.sha256(json.dumps([operations, self._options, _machine()]).encode()).hexdigest()[:32]
        code = self._codes.get(kind)
        if code is None:
            code = self._codes[kind] = _from_disk(kind) or self._compile(kind, function, inputs, weights)
        return code, weights

    def _compile(
        self, kind: str, function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> DirectCode:
        _log.info("compiling for this machine, once (part %d)", len(self._codes) + 1)
        graph, examples = _traced(function, inputs, weights)
        library = _built(graph, examples, self._options)
        sizes = _sizes_of(examples[: len(inputs)])  # only now: the compiler adds conditions
        keep(kind, library, sizes)
        return DirectCode(_loaded(library), sizes)


# --- compiling ---


def _traced(function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """The function as a graph of inputs and weights, and what stands for each of these, with symbols for sizes."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with recorded_as(GRAPH):
        graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    examples = [node.meta["val"] for node in nodes]
    mode = examples[0].fake_mode
    for node, weight in zip(_lift(graph, nodes[-1], weights), weights, strict=True):
        node.meta["val"] = mode.from_tensor(weight, static_shapes=True)
        examples.append(node.meta["val"])
    return graph, examples


def _lift(graph: Any, after: Any, weights: Sequence[Tensor]) -> list[Any]:
    """Let the weights be inputs, after those that there are; in the graph they are constants. -> their nodes."""
    places = []
    for index in range(len(weights)):
        with graph.graph.inserting_after(after):
            after = graph.graph.placeholder(f"weight_{index}")
        places.append(after)
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            constant = getattr(graph, node.target)
            (index,) = (index for index, weight in enumerate(weights) if weight is constant)
            node.replace_all_uses_with(places[index])
            graph.graph.erase_node(node)
    graph.recompile()
    return places


def _built(graph: Any, examples: Sequence[Tensor], options: dict[str, Any]) -> Path:
    """The graph as a shared library, in a folder of torch's."""
    import torch._inductor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the insides of torch
        return Path(str(torch._inductor.aot_compile(graph, tuple(examples), options=known_options(options))))


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of these options of torch's compiler that this version of torch knows."""
    import torch._inductor.config as known

    return {name: value for name, value in options.items() if hasattr(known, name)}


def _sizes_of(examples: Sequence[Any]) -> Sizes:
    shape_env = examples[0].fake_mode.shape_env
    sizes = {place: [_fixed(size) for size in (*each.shape, *each.stride())] for place, each in enumerate(examples)}
    condition = shape_env.produce_guards_expression(examples)
    return Sizes({place: each for place, each in sizes.items() if None in each}, condition)


def _fixed(size: Any) -> int | None:
    """A size as a number; None if it is a symbol that has not turned out to be one."""
    number: int | None = size if isinstance(size, int) else size.node.maybe_as_int()
    return number


# --- the library ---


def _from_disk(kind: str) -> DirectCode | None:
    """What an earlier process compiled; None where there is nothing that can be used."""
    found = kept(kind)
    if found is None:
        return None
    library, sizes = found
    try:
        return DirectCode(_loaded(library), sizes)
    except (OSError, RuntimeError, ValueError, AttributeError):  # a folder without execution, an odd condition
        return None


def _loaded(library: Path) -> Run:
    run: Run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1).run
    return run


@cache
def _machine_of(threads: int) -> list[Any]:
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = [platform.machine(), cpu_name(), cpu_flags(), capability]
    return [FORMAT, torch.__version__, platform.system(), *cpu, threads]


def _machine() -> list[Any]:
    """What compiled code is for, besides the function."""
    return _machine_of(torch.get_num_threads())
