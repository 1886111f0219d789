"""Attention of one sequence over packed entries in a compiled step: loops of a compiler, or calls of torch's kernels.

The loops win where there are few entries, by far; where there are many, it depends on the machine, and is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkv.kernels import row_attention
from fastkv.kernels.calibration import Way, calibration, is_on
from fastkv.kernels.direct import DirectCode
from fastkv.kernels.packed_attention import packed_attention
from fastkv.kernels.packed_loops import in_words, packed_loops, places_of, scheme_of
from fastkv.kernels.packing import SCHEMES, Packed, Scheme
from fastkv.kernels.recording import Function
from fastkv.kernels.tracing import fix

# Of the compiler: all products of a sum in one loop, however many tensors it reads.
PACKED_LOOPS = {"realize_acc_reads_threshold": 100, "realize_opcount_threshold": 1000}

_LOOPS, _CALLS = "loops", "calls"
# Blocks, and exact entries, that the compiler is told of. Sizes that are equal there it takes for one: so these are
# none that heads, queries, blocks or channels have.
_USUAL, _EXACT, _ROOM = 101, 61, 3
_MOST_SUMS = 96  # in one loop: planes of a word for each query head. Compiling takes longer with each of them
_COLD = 32 << 20  # bytes of entries that are read in turn while a way is timed
_MOST = 64  # layers' worth of them

_Entries = tuple[Tensor, ...]  # as QuantisedLayer.row has them
_Known = tuple[DirectCode, list[Tensor]]


class PackedRow:
    """Attention of q [1, Hq, 1, D] over what `QuantisedLayer.row` gives.

    compiled: makes code of a function with this name, or None. Sizes that the code does not fit go by calls: one block
    alone, and more than 4,096, above which the compiler would build sums otherwise.
    """

    def __init__(self, compiled: Callable[[str, Function, Sequence[Tensor]], _Known | None]) -> None:
        self._compiled = compiled
        self._codes: dict[tuple[int, ...], _Known | None] = {}
        self._ways: dict[tuple[int, ...], str] = {}

    def __call__(self, q: Tensor, entries: _Entries) -> Tensor:
        rows = q.reshape(entries[0].shape[0], -1, q.shape[3])
        code = self._code(rows, entries)
        if code is not None and code[0].fits((rows, *entries)) and self._way(rows, entries, code) == _LOOPS:
            return code[0].run([rows, *entries, *code[1]])[0].view(q.shape)
        return by_calls(rows, *entries)[0].view(q.shape)

    def prepare(self, rows: Tensor, kv_dtype: str) -> None:
        """Compile for rows [Hkv, G, D] of a model, so that the first step does not wait for it."""
        self._code(rows, _entries_of(rows, SCHEMES[kv_dtype], _USUAL))

    def _code(self, rows: Tensor, entries: _Entries) -> _Known | None:
        key = *rows.shape, entries[0].shape[3], torch.get_num_threads()
        if key not in self._codes:
            self._codes[key] = self._made(rows, scheme_of(entries[0], rows.shape[2]))
        return self._codes[key]

    def _made(self, rows: Tensor, scheme: Scheme) -> _Known | None:
        """Code for rows like these, whichever sequence comes first; None where it would be long, or cannot be made."""
        if rows.shape[1] * len(places_of(scheme)) > _MOST_SUMS:
            return None
        inputs = torch.zeros_like(rows), *_entries_of(rows, scheme, _USUAL)
        return self._compiled(f"int{scheme.bits}", _loops_for(inputs), inputs)

    def _way(self, rows: Tensor, entries: _Entries, code: _Known) -> str:
        """The faster one over about as many entries."""
        codes = entries[0]
        size = row_attention.size_class(codes.shape[1] * codes.shape[2])
        key = codes.shape[3], size, torch.get_num_threads()
        known = self._ways.get(key)
        if known is None:
            known = self._ways[key] = _choose(rows, scheme_of(codes, rows.shape[2]), size, code)
        return known


def by_calls(rows: Tensor, *entries: Tensor) -> tuple[Tensor]:
    """What the loops compute, by packed_attention: rows [Hkv, G, D] and the entries -> one tensor as rows."""
    words, k, v = Packed(*entries[:4]), entries[4], entries[5]
    packed = words._replace(k=words.k.view(torch.uint8), v=words.v.view(torch.uint8))
    return (packed_attention(scheme_of(words.k, rows.shape[2]), rows, packed, k[0], v[0]),)


def _loops_for(inputs: Sequence[Tensor]) -> Function:
    """packed_loops for inputs of these sizes, but for the number of blocks and of exact entries."""
    opens = (None, *[1] * len(Packed._fields), 2, 2)
    sizes = [
        [(place, int(size)) for place, size in enumerate(each.shape) if place != is_open]
        for each, is_open in zip(inputs, opens, strict=True)
    ]

    def loops(rows: Tensor, *entries: Tensor) -> tuple[Tensor]:
        for each, fixed in zip((rows, *entries), sizes, strict=True):
            for place, size in fixed:
                fix(place, size, each)
        return (packed_loops(rows, Packed(*entries[:4]), entries[4][0], entries[5][0]),)

    return loops


def _entries_of(rows: Tensor, scheme: Scheme, n_blocks: int) -> _Entries:
    """Entries of a cache that holds so many blocks and some exact entries, with room for more: zeros."""
    n_heads, _, head_dim = rows.shape
    shapes = scheme.shapes(head_dim)
    blocks = (torch.zeros((n_blocks, n_heads, *shape), dtype=dtype).transpose(0, 1) for shape, dtype in shapes)
    words = in_words(Packed(*blocks))
    exact = (rows.new_zeros(1, n_heads, _EXACT + _ROOM, head_dim)[:, :, :_EXACT] for _ in range(2))
    return (*words, *exact)


def _choose(rows: Tensor, scheme: Scheme, size: int, code: _Known) -> str:
    if not is_on():
        return _LOOPS
    n_heads, n_rows, head_dim = rows.shape
    dtype = str(rows.dtype).removeprefix("torch.")
    about = (
        f"compiled attention over int{scheme.bits} entries, {n_heads} x {n_rows} heads of {head_dim}, "
        f"{1 << size} entries, {dtype}"
    )
    return calibration().choose(about, _LOOPS, (_LOOPS, _CALLS), lambda: _timed(rows, scheme, size, code))


def _timed(rows: Tensor, scheme: Scheme, size: int, code: _Known) -> dict[str, Way]:
    """Both ways over the entries of a number of layers, so many that they come from memory."""
    n_blocks = max(2, (1 << size) // scheme.block)
    layers = min(_MOST, max(1, _COLD // (n_blocks * rows.shape[0] * scheme.block_bytes(rows.shape[2]))))
    entries = [_entries_of(rows, scheme, n_blocks) for _ in range(layers)]
    for each in entries:
        for part in each:
            part.fill_(1)  # zeros that nobody has written are in no memory

    def loops() -> None:
        for each in entries:
            if not code[0].fits((rows, *each)):
                raise ValueError("compiled for other sizes")
            code[0].run([rows, *each, *code[1]])

    def calls() -> None:
        for each in entries:
            by_calls(rows, *each)

    return {_LOOPS: loops, _CALLS: calls}
