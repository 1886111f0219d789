"""A decode step of one sequence on a CPU as few compiled functions, each from a layer's entries to the next q, k, v.

A step of a small model spends more time between its operations than in them. So attention over the entries, the rest
of the layer and the projections of the next one are one function, called directly (engine/direct.py). The cache stays
as it is: what is read from it comes in, what is written to it goes out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkv.engine.direct import DirectCode, DirectCompiler, Function
from fastkv.kernels import row_attention
from fastkv.kernels.calibration import calibration, is_on
from fastkv.models.block import Block
from fastkv.models.layers import Rope, Rotation
from fastkv.models.llama import Llama

_LOOPS = "loops"  # attention as loops that the compiler writes; the other ways are calls of torch's kernels
_USUAL = 509  # entries that the compiler is told of; it decides by them what is worth two threads
_SHORT = 1024  # entries up to which loops are taken where nothing is measured

_log = logging.getLogger(__name__)

_Compiled = tuple[DirectCode, list[Tensor]]  # and the weights
_Inputs = tuple[Tensor, ...]  # hidden, q, k, v, and cos and sin of each rotation where another layer follows


class CompiledRow:
    """The functions of a model for one token of one sequence (RowFunctions). options: of torch's compiler.

    They are compiled when they are first needed. Where that fails, or sizes do not fit, they run as they are.
    """

    def __init__(self, model: Llama, options: dict[str, Any]) -> None:
        self._model = model
        self._compiler = DirectCompiler(options)
        self._known: dict[tuple[int | str, ...], _Compiled] = {}
        self._ways: dict[tuple[int, ...], str] = {}
        self._works = True

    def between(
        self, layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See RowFunctions."""
        tables = [table for each in rope.rotations for table in (each.cos, each.sin)]
        hidden, q, k, v = self._run(layer, (hidden, q, k, v, *tables))
        return hidden, q, k, v

    def last(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See RowFunctions."""
        return self._run(len(self._model.blocks) - 1, (hidden, q, k, v))[0]

    def _run(self, layer: int, inputs: _Inputs) -> Sequence[Tensor]:
        compiled = self._compiled_if_possible(layer, inputs)
        if compiled is None or not compiled[0].fits({2: inputs[2], 3: inputs[3]}):
            return self._function(layer, row_attention.name_for(_rows(*inputs[1:3]), inputs[2]))(*inputs)
        code, weights = compiled
        hidden, q, k, v, *tables = inputs
        # Compiled for these without gaps (see _likeness); of k and v `fits` has seen to it.
        return code.run(hidden.contiguous(), q.contiguous(), k, v, *[each.contiguous() for each in tables], *weights)

    def _compiled_if_possible(self, layer: int, inputs: _Inputs) -> _Compiled | None:
        if not self._works:
            return None
        try:
            return self._compiled(layer, self._way(layer, inputs), inputs)
        except Exception as error:  # whatever the compiler and the tools around it raise
            self._works = False
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            _log.warning("decode steps of a single sequence are not compiled, and slower for it: %s", reason)
            return None

    def _compiled(self, layer: int, way: str, inputs: _Inputs) -> _Compiled:
        key = layer, way, torch.get_num_threads()
        known = self._known.get(key)
        if known is None:
            function, examples = self._function(layer, way), _likeness(inputs)
            known = self._known[key] = self._compiler.compiled(function, examples, torch.get_num_threads())
        return known

    def _function(self, layer: int, way: str) -> Function:
        blocks = self._model.blocks
        if layer == len(blocks) - 1:
            return partial(_last, self._model, way)
        return partial(_between, blocks[layer], blocks[layer + 1], way)

    def _way(self, layer: int, inputs: _Inputs) -> str:
        """The fastest attention over about as many entries."""
        k = inputs[2]
        key = row_attention.size_class(k), torch.get_num_threads()
        known = self._ways.get(key)
        if known is None:
            known = self._ways[key] = self._choose(layer, inputs)
        return known

    def _choose(self, layer: int, inputs: _Inputs) -> str:
        _, q, k, *_ = inputs
        rows = _rows(q, k)
        other = row_attention.name_for(rows, k)
        default = _LOOPS if k.shape[2] <= _SHORT else other
        if not is_on():
            return default
        about = f"compiled step, {row_attention.told(rows, k)}"
        names = [_LOOPS, *row_attention.ways_of(rows.shape[2])]
        return calibration().choose(about, default, names, lambda: self._timed(layer, inputs, (_LOOPS, other)))

    def _timed(self, layer: int, inputs: _Inputs, ways: tuple[str, ...]) -> dict[str, Any]:
        """A layer's function, with each way, over the entries of a number of layers."""
        hidden, q, k, _, *tables = inputs
        entries = row_attention.cold_entries(_rows(q, k), k)

        def compute(way: str) -> None:
            code, weights = self._compiled(layer, way, inputs)
            for k, v in entries:
                if not code.fits({2: k, 3: v}):
                    raise ValueError("compiled for other sizes")
                code.run(hidden, q, k, v, *tables, *weights)

        return {way: partial(compute, way) for way in ways}


def _likeness(inputs: _Inputs) -> _Inputs:
    """The inputs that are compiled for: of these sizes, whichever sequence comes first, with a usual number of entries.

    Strides of a dimension of 1 differ between what is compiled and what is not, and would make two codes of one.
    """
    hidden, q, k, v, *tables = (each.new_empty(each.shape) for each in inputs)
    k, v = (each.new_empty(*each.shape[:2], _USUAL + 3, each.shape[3])[:, :, :_USUAL] for each in (k, v))
    return hidden, q, k, v, *tables


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """q [1, Hq, 1, D] -> [1, Hkv, G, D]: the query heads of a KV head."""
    return q.reshape(1, k.shape[1], -1, q.shape[3])


def _between(
    block: Block, after: Block, way: str, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor
) -> Any:
    hidden = hidden.clone()
    type(block).finish_(block, hidden, _attended(way, block, q, k, v))
    rotations = tuple(Rotation(cos, sin) for cos, sin in zip(tables[::2], tables[1::2], strict=True))
    return hidden, *type(after).project(after, hidden, Rope(rotations))


def _last(model: Llama, way: str, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    hidden = hidden.clone()
    block = model.blocks[-1]
    type(block).finish_(block, hidden, _attended(way, block, q, k, v))
    return (model.head(hidden),)


def _attended(way: str, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n_q, n_kv, _ = block.self_attn.heads
    for entries in (k, v):
        torch._check(entries.shape[1] == n_kv)  # else the compiler would leave it open
    rows = q.reshape(1, n_kv, n_q // n_kv, block.self_attn.head_dim)
    attend = _loops if way == _LOOPS else row_attention.ways_of(n_q // n_kv)[way]
    return attend(rows, k, v).reshape(1, n_q, 1, block.self_attn.head_dim)


def _loops(rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """rows [1, Hkv, G, D] over the entries k and v [1, Hkv, n, D], as sums for the compiler to write loops of."""
    queries = rows.unsqueeze(3).float() * rows.shape[-1] ** -0.5  # [1, Hkv, G, 1, D]
    weights = (queries * k.unsqueeze(2).float()).sum(dim=-1).softmax(dim=-1)  # [1, Hkv, G, n]
    return (weights.unsqueeze(-1) * v.unsqueeze(2).float()).sum(dim=-2).to(rows.dtype)
