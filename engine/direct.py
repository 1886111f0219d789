"""torch's compiler called without torch.compile: a function is recorded, compiled once, and its code called as it is.

At each call torch.compile looks up which of its compiled code fits, by everything that the function has read. For a
layer of a small model that takes as long as its attention. Here it is done once for each function: those that do the
same operations on other weights share their code. A call compares the sizes of its inputs, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkv.kernels.tracing import recording

Function = Callable[..., tuple[Tensor, ...]]  # of tensors alone; what else they read are the weights

_MOST_SIZES = 10_000  # that are remembered; a sequence that grows has new ones with each token


class DirectCode:
    """Compiled code of a function, and the sizes of inputs that it holds for.

    run: (the inputs and the weights) -> the outputs. examples: the inputs as they were recorded, some of whose sizes
    are symbols.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor], shape_env: Any) -> None:
        self.run = run
        self._examples, self._shape_env = examples, shape_env
        self._open = [place for place, each in enumerate(examples) if not all(map(_is_number, _sizes(each)))]
        self._condition: str | None = shape_env.produce_guards_expression(examples)  # on the symbols
        self._known: dict[Any, bool] = {}

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the inputs fit. Those without a symbol among their sizes are taken to be as they were recorded."""
        sizes = tuple([(inputs[place].shape, inputs[place].stride()) for place in self._open])
        known = self._known.get(sizes)
        if known is None:
            if len(self._known) > _MOST_SIZES:
                self._known.clear()
            known = self._known[sizes] = self._compare(inputs)
        return known

    def _compare(self, inputs: Sequence[Tensor]) -> bool:
        for place in self._open:
            pairs = zip(_sizes(inputs[place]), _sizes(self._examples[place]), strict=True)
            if any(_is_number(then) and now != then for now, then in pairs):
                return False
        if self._condition is None:
            return True
        return bool(self._shape_env.evaluate_guards_expression(self._condition, list(map(_Sizes, inputs))))


class DirectCompiler:
    """Compiles functions, each kind once. options: of torch's compiler."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._codes: dict[str, DirectCode] = {}

    def compiled(self, function: Function, inputs: Sequence[Tensor], key: object) -> tuple[DirectCode, list[Tensor]]:
        """The code for a function, and the weights to call it with after the inputs.

        It holds for inputs like these, in dtype and dimensions; sizes other than 1 may change as far as the function
        leaves them open. An input that it changes must share no memory with another one. key: what else than operations
        and weights tells code apart, such as the number of threads. Raises whatever torch raises where it cannot be
        done.
        """
        operations, weights = recorded(function, inputs)
        kind = f"{key} {operations}"
        code = self._codes.get(kind)
        if code is None:
            code = self._codes[kind] = self._compile(function, inputs, weights)
        return code, weights

    def _compile(self, function: Function, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> DirectCode:
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        with recording():
            graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        examples = [node.meta["val"] for node in nodes]
        mode = examples[0].fake_mode
        lifted = _lift(graph, nodes[-1], weights)
        for node, weight in zip(lifted, weights, strict=True):
            node.meta["val"] = mode.from_tensor(weight, static_shapes=True)
            examples.append(node.meta["val"])
        run: Any = torch._inductor.compile(graph, examples, options=self._options)
        return DirectCode(run, examples[: len(inputs)], mode.shape_env)  # the weights' sizes belong to the kind


def recorded(function: Function, inputs: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """What a function does with inputs like these, as text: the same for two functions that differ in weights alone.

    The weights are the tensors that it reads besides, in the order of their first use. Nothing is computed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        likenesses = [fake.from_tensor(each, static_shapes=True) for each in inputs]
        with _Recorder(likenesses) as recorder, recording():
            outputs = function(*likenesses)
    return "\n".join([*recorder.lines, f"return {recorder.told(outputs)}"]), recorder.weights


class _Recorder(TorchDispatchMode):
    """Writes down every operation, with its tensors by number."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.weights: list[Tensor] = []
        self._numbers: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one of them
        for each in inputs:
            self._number(each, "input")

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = self.told((args, kwargs or {}))
        outputs = operator(*args, **(kwargs or {}))
        for each in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(each, Tensor) and id(each) not in self._numbers:
                self._number(each, "made")
        self.lines.append(f"{self.told(outputs)} = {operator}{arguments}")
        return outputs

    def told(self, value: Any) -> str:
        """A value as text; a tensor that nothing before has made or given is a weight."""
        if isinstance(value, Tensor):
            if id(value) not in self._numbers:
                self.weights.append(value)
                self._number(value, "weight")
            return self._numbers[id(value)]
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self.told, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name}: {self.told(each)}' for name, each in value.items())}}}"
        return repr(value)

    def _number(self, tensor: Tensor, kind: str) -> None:
        name = f"{kind}{len(self._numbers)}"
        if kind != "made":  # what is made follows from the rest
            name += f" {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
        self._numbers[id(tensor)] = name
        self._alive.append(tensor)


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


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    return *tensor.shape, *tensor.stride()


def _is_number(size: Any) -> bool:
    """Whether a size is fixed; a symbol may have turned out to be."""
    return isinstance(size, int) or size.node.maybe_as_int() is not None


class _Sizes:
    """A tensor's sizes. Where it begins in its storage makes no difference to compiled code, but conditions name it."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride = tensor.size, tensor.stride

    def storage_offset(self) -> int:
        return 2  # what torch takes for any number but 0 and 1
