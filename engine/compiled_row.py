"""A decode step of one sequence on a CPU as few compiled functions, each from a layer's entries to the next q, k, v.

A step of a small model spends more time between its operations than in them. So attention over the entries, the rest
of the layer and the projections of the next one are one function, called directly (kernels/direct.py), which writes k
and v into the cache itself. Attention over packed entries is a function of its own (packed_row.py); that of any other
kind is called between functions that hold the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkv.engine.packed_row import PACKED_LOOPS, PackedRow
from fastkv.kernels import row_attention
from fastkv.kernels.calibration import calibration, is_on
from fastkv.kernels.direct import DirectCode, DirectCompiler
from fastkv.kernels.packed_loops import has_loops
from fastkv.kernels.recording import Function
from fastkv.kernels.tracing import fix
from fastkv.models.block import Block
from fastkv.models.layers import Rope, Rotation
from fastkv.models.llama import LayerAttention, Llama

_LOOPS = "loops"  # attention as loops that the compiler writes; the other ways are calls of torch's kernels
_MASKED = "masked"  # that of several tokens, each of which sees the tokens up to itself
_GIVEN = "given"  # no attention: it is not a part of the function, and what was attended stands in place of q
_USUAL = 509  # entries that the compiler is told of; it decides by them what is worth two threads
_SHORT = 10  # the size class (below 1,024 entries) up to which loops are taken where nothing is measured

_log = logging.getLogger(__name__)

_Compiled = tuple[DirectCode, list[Tensor]]  # and the weights
_Inputs = tuple[Tensor, ...]
_BEFORE = -1  # in place of a layer: what comes before the first attention


class CompiledRow:
    """The layers of a model for one token of one sequence, or JUDGED (RowLayers). options: of torch's compiler.

    What `prepare` has not compiled is compiled when it is first needed. Where that fails, or sizes do not fit, they run
    as they are.
    """

    def __init__(self, model: Llama, options: dict[str, Any]) -> None:
        self._model = model
        self._compiler = DirectCompiler(options)
        self._packed = PackedRow(partial(self._code_or_none, DirectCompiler(PACKED_LOOPS)))
        self._known: dict[tuple[int | str, ...], _Compiled] = {}
        self._ways: dict[tuple[int, ...], str] = {}
        self._failed: set[tuple[str, int, int]] = set()  # ways that could not be compiled, for how many tokens, threads

    @torch.inference_mode()
    def prepare(self, count: int = 1, kv_dtype: str | None = None) -> None:
        """See RowLayers."""
        config, dtype = self._model.config, self._model.dtype
        hidden, q = (
            torch.zeros(1, *size, dtype=dtype)
            for size in ((count, config.hidden_size), (config.n_heads, count, config.head_dim))
        )
        k = torch.zeros(1, config.n_kv_heads, _USUAL, config.head_dim, dtype=dtype)
        new, rope = k[:, :, -count:], self._model.rope_of_range(0, count)
        tables = [table for each in rope.rotations for table in (each.cos, each.sin)]
        last = len(self._model.blocks) - 1
        self._compiled_if_possible(_BEFORE, (hidden, new, new, *tables))
        loops = has_loops(config.head_dim, config.windows)
        if kv_dtype is None or loops:  # as long as nothing is packed
            for layer in range(last):
                self._compiled_if_possible(layer, (hidden, q, k, k, new, new, *tables))
            self._compiled_if_possible(last, (hidden, q, k, k))
        if kv_dtype is not None:
            for layer in range(last):
                self._compiled_if_possible(layer, (hidden, q, new, new, *tables), _GIVEN)
            self._compiled_if_possible(last, (hidden, q), _GIVEN)
            if loops:
                self._packed.prepare(_rows(q[:, :, :1], k)[0], kv_dtype)

    def logits(self, hidden: Tensor, rope: Rope, entries: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """See RowLayers."""
        tables = [table.contiguous() for each in rope.rotations for table in (each.cos, each.sin)]
        own = slice(-hidden.shape[1], None)
        new = [tuple(each[:, :, own] for each in of_layer[-2:]) for of_layer in entries]
        (q,) = self._run(_BEFORE, (hidden, *new[0], *tables))
        for layer, of_layer in enumerate(entries[:-1]):
            hidden, q = self._layer(layer, hidden, q.contiguous(), of_layer, (*new[layer + 1], *tables))
        return self._layer(len(entries) - 1, hidden, q.contiguous(), entries[-1], ())[0]

    def logits_around(self, hidden: Tensor, rope: Rope, attend: LayerAttention) -> Tensor:
        """See RowLayers."""
        tables = [table.contiguous() for each in rope.rotations for table in (each.cos, each.sin)]
        k, v = self._new()
        (q,) = self._run(_BEFORE, (hidden, k, v, *tables))
        last = len(self._model.blocks) - 1
        for layer in range(last):
            attended, (k, v) = attend(layer, q, k, v), self._new()
            hidden, q = self._run(layer, (hidden, attended.contiguous(), k, v, *tables), _GIVEN)
        return self._run(last, (hidden, attend(last, q, k, v).contiguous()), _GIVEN)[0]

    def _new(self) -> tuple[Tensor, Tensor]:
        """Where k and v [1, Hkv, 1, D] of a token are written to: with gaps, as in the memory of a cache."""
        config = self._model.config
        k, v = torch.empty(2, 1, config.n_kv_heads, 2, config.head_dim, dtype=self._model.dtype)[:, :, :, :1]
        return k, v

    def _layer(
        self, layer: int, hidden: Tensor, q: Tensor, entries: tuple[Tensor, ...], others: _Inputs
    ) -> Sequence[Tensor]:
        if len(entries) == 2:
            return self._run(layer, (hidden, q, *entries, *others))
        return self._run(layer, (hidden, self._packed(q, entries), *others), _GIVEN)

    def _run(self, layer: int, inputs: _Inputs, way: str | None = None) -> Sequence[Tensor]:
        compiled = self._compiled_if_possible(layer, inputs, way)
        if compiled is None or not compiled[0].fits(inputs):
            return self._function(layer, way or self._plain_way(layer, inputs))(*inputs)
        code, weights = compiled
        return code.run([*inputs, *weights])

    def _compiled_if_possible(self, layer: int, inputs: _Inputs, way: str | None = None) -> _Compiled | None:
        """way: of attention (None: the fastest)."""
        taken = self._way(layer, inputs) if way is None else way
        return self._if_possible(taken, inputs, lambda: self._compiled(layer, taken, inputs))

    def _code_or_none(
        self, compiler: DirectCompiler, way: str, function: Function, inputs: Sequence[Tensor]
    ) -> _Compiled | None:
        return self._if_possible(way, inputs, lambda: compiler.compiled(function, inputs))

    def _if_possible(self, way: str, inputs: Sequence[Tensor], make: Callable[[], _Compiled]) -> _Compiled | None:
        which = way, inputs[0].shape[1], torch.get_num_threads()
        if which in self._failed:
            return None
        try:
            return make()
        except Exception as error:  # whatever the compiler and the tools around it raise
            if not self._failed:
                reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                _log.warning("some decode steps are not compiled, and slower for it: %s", reason)
            self._failed.add(which)
            return None

    def _compiled(self, layer: int, way: str, inputs: _Inputs) -> _Compiled:
        key = layer, way, inputs[0].shape[1], torch.get_num_threads()
        known = self._known.get(key)
        if known is None:
            function, examples = self._counted(layer, way, inputs[0].shape[1]), _likeness(layer, way, inputs)
            known = self._known[key] = self._compiler.compiled(function, examples)
        return known

    def _function(self, layer: int, way: str) -> Function:
        blocks = self._model.blocks
        if layer == _BEFORE:
            return partial(_before, blocks[0])
        if layer == len(blocks) - 1:
            return partial(_head, self._model) if way == _GIVEN else partial(_last, self._model, way)
        after = blocks[layer + 1]
        return partial(_after, blocks[layer], after) if way == _GIVEN else partial(_between, blocks[layer], after, way)

    def _counted(self, layer: int, way: str, count: int) -> Function:
        """The function of a layer for so many tokens, which the compiler would leave open."""
        function = self._function(layer, way)

        def counted(*inputs: Tensor) -> tuple[Tensor, ...]:
            fix(1, count, inputs[0])
            fix(2, count, *(inputs[1:] if layer == _BEFORE or way == _GIVEN else (inputs[1], *inputs[4:])))
            return function(*inputs)

        return counted

    def _way(self, layer: int, inputs: _Inputs) -> str:
        """The fastest attention over about as many entries."""
        if layer == _BEFORE:
            return ""
        key = row_attention.size_class(inputs[2].shape[2]), inputs[0].shape[1], torch.get_num_threads()
        known = self._ways.get(key)
        if known is None:
            known = self._ways[key] = self._choose(layer, inputs)
        return known

    def _plain_way(self, layer: int, inputs: _Inputs) -> str:
        """The fastest of torch's own kernels for it."""
        if layer == _BEFORE:
            return ""
        if inputs[0].shape[1] > 1:
            return _MASKED
        return row_attention.chosen_way(_rows(inputs[1], inputs[2]), inputs[2])[0]

    def _choose(self, layer: int, inputs: _Inputs) -> str:
        _, q, k, *_ = inputs
        rows, other = _rows(q, k), self._plain_way(layer, inputs)
        default = _LOOPS if row_attention.size_class(k.shape[2]) <= _SHORT else other
        if not is_on():
            return default
        count = inputs[0].shape[1]
        of = "" if count == 1 else f" of {count} tokens"
        about = f"compiled step{of}, {row_attention.told(rows, k)}"
        names = [_LOOPS, *(row_attention.ways_of(rows.shape[2]) if count == 1 else [_MASKED])]
        return calibration().choose(about, default, names, lambda: self._timed(layer, inputs, (_LOOPS, other)))

    def _timed(self, layer: int, inputs: _Inputs, ways: tuple[str, ...]) -> dict[str, Any]:
        """A layer's function, with each way, over the entries of a number of layers."""
        hidden, q, k, _, *others = inputs
        entries = row_attention.cold_entries(_rows(q, k), k)

        def compute(way: str) -> None:
            code, weights = self._compiled(layer, way, inputs)
            for each in entries:
                if not code.fits((hidden, q, *each, *others)):
                    raise ValueError("compiled for other sizes")
                code.run([hidden, q, *each, *others, *weights])

        return {way: partial(compute, way) for way in ways}


def _likeness(layer: int, way: str, inputs: _Inputs) -> _Inputs:
    """The inputs that are compiled for: of these sizes, whichever sequence comes first, with a usual number of entries.

    Strides of a dimension of 1 differ between what is compiled and what is not, and would make two codes of one.
    """
    if layer == _BEFORE:
        entries, new = range(0), range(1, 3)
    else:
        entries, new = (range(0), range(2, 4)) if way == _GIVEN else (range(2, 4), range(4, 6))
    made = []
    for place, each in enumerate(inputs):
        if place in entries:
            made.append(_with_room(each, _USUAL, 3))
        elif place in new:  # a memory of another size than that of the entries
            made.append(_with_room(each, inputs[0].shape[1], _USUAL))
        else:
            made.append(each.new_zeros(each.shape))
    return tuple(made)


def _with_room(entries: Tensor, n: int, more: int) -> Tensor:
    """As entries [1, Hkv, _, D], n of them with room for more."""
    _, n_heads, _, head_dim = entries.shape
    return entries.new_zeros(1, n_heads, n + more, head_dim)[:, :, :n]


def _rows(q: Tensor, k: Tensor) -> Tensor:
    """q [1, Hq, T, D] -> [1, Hkv, G T, D]: the query heads of a KV head."""
    return q.reshape(1, k.shape[1], -1, q.shape[3])


def _before(block: Block, hidden: Tensor, new_k: Tensor, new_v: Tensor, *tables: Tensor) -> tuple[Tensor]:
    """hidden [1, T, E] -> q [1, Hq, T, D]; k and v go into new_k and new_v, [1, Hkv, T, D]."""
    fix(1, block.self_attn.heads[1], new_k, new_v)
    rotations = tuple(Rotation(cos, sin) for cos, sin in zip(tables[::2], tables[1::2], strict=True))
    q, k, v = type(block).project(block, hidden, Rope(rotations))
    new_k.copy_(k)
    new_v.copy_(v)
    return (q,)


def _between(
    block: Block, after: Block, way: str, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor
) -> tuple[Tensor, Tensor]:
    """hidden, and q over the entries k and v -> the new hidden, and q of the next layer; others: as for `_before`."""
    return _after(block, after, hidden, _attended(way, block, q, k, v), *others)


def _after(block: Block, after: Block, hidden: Tensor, attended: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """`_between` from attended [1, Hq, T, D] on."""
    hidden = _finished(block, hidden, attended)
    return hidden, *_before(after, hidden, *others)


def _last(model: Llama, way: str, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return _head(model, hidden, _attended(way, model.blocks[-1], q, k, v))


def _head(model: Llama, hidden: Tensor, attended: Tensor) -> tuple[Tensor]:
    return (model.head(_finished(model.blocks[-1], hidden, attended)),)


def _finished(block: Block, hidden: Tensor, attended: Tensor) -> Tensor:
    fix(1, block.self_attn.heads[0], attended)
    hidden = hidden.clone()
    type(block).finish_(block, hidden, attended)
    return hidden


def _attended(way: str, block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n_q, n_kv, _ = block.self_attn.heads
    fix(1, n_q, q)
    fix(1, n_kv, k, v)
    count, head_dim = int(q.shape[2]), block.self_attn.head_dim
    rows = q.reshape(1, n_kv, n_q // n_kv * count, head_dim)
    if way == _LOOPS:
        attended = _loops(rows, k, v, count)
    elif way == _MASKED:
        attended = row_attention.of_last_tokens(rows, k, v, count)
    else:
        attended = row_attention.ways_of(n_q // n_kv)[way](rows, k, v)
    return attended.reshape(1, n_q, count, head_dim)


def _loops(rows: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """rows [1, Hkv, G T, D] of `count` tokens, T, over the entries k and v [1, Hkv, n, D], the last T of them theirs.

    As sums for the compiler to write loops of.
    """
    queries = rows.unsqueeze(3).float() * rows.shape[-1] ** -0.5  # [1, Hkv, G T, 1, D]
    logits = (queries * k.unsqueeze(2).float()).sum(dim=-1)  # [1, Hkv, G T, n]
    if count > 1:
        logits = logits + row_attention.causal_mask(count, k.shape[2], logits).repeat(rows.shape[2] // count, 1)
    weights = logits.softmax(dim=-1)
    return (weights.unsqueeze(-1) * v.unsqueeze(2).float()).sum(dim=-2).to(rows.dtype)
