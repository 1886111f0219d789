"""What a function does, as text: two functions with the same text differ in their weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastkv.kernels.tracing import NAMES, recorded_as

Function = Callable[..., tuple[Tensor, ...]]  # of tensors alone; what else they read are the weights


def recorded(function: Function, inputs: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Run a function, and tell what it did: every call of torch, with sizes and dtypes of the inputs and weights.

    The weights are the tensors that it reads besides, in the order of their first use.
    """
    with _Recorder(inputs) as recorder, recorded_as(NAMES):
        outputs = function(*inputs)
    return "\n".join([*recorder.lines, f"return {recorder.told(outputs)}"]), recorder.weights


class _Recorder(TorchFunctionMode):
    """Writes down every call of torch, with its tensors by number. (TorchDispatchMode would import the compiler.)"""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.weights: list[Tensor] = []
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one of them
        for each in inputs:
            self._name(each, "input")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = self.told((args, kwargs or {}))
        outputs = function(*args, **(kwargs or {}))
        for each in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(each, Tensor) and id(each) not in self._names:
                self._name(each, "made")
        self.lines.append(f"{self.told(outputs)} = {_name_of(function)}{arguments}")
        return outputs

    def told(self, value: Any) -> str:
        """A value as text; a tensor that nothing before has made or given is a weight."""
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                self.weights.append(value)
                self._name(value, "weight")
            return self._names[id(value)]
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self.told, value))})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name}: {self.told(each)}' for name, each in value.items())}}}"
        return repr(value)

    def _name(self, tensor: Tensor, kind: str) -> None:
        name = f"{kind}{len(self._names)}"
        if kind != "made":  # what is made follows from the rest
            name += f" {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
        self._names[id(tensor)] = name
        self._alive.append(tensor)


def _name_of(function: Any) -> str:
    """What a function of torch is called; of an attribute, its name."""
    if getattr(function, "__name__", "") == "__get__":
        return f"attribute {function.__self__.__name__}"
    return getattr(function, "__qualname__", None) or str(function)
