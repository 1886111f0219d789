"""Many requests, decoded together: one that is done leaves its slot to one that waits (continuous batching)."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Generator, Sequence

from fastkv.cache.pool import bytes_of
from fastkv.engine.answer import Answer
from fastkv.engine.decode_batch import DecodeBatch, capacities_of, layout_of
from fastkv.engine.footprint import Footprint, footprint
from fastkv.engine.memory import available_bytes, explain_out_of_memory, peak_bytes, share_of
from fastkv.engine.one_reader import OneReader
from fastkv.engine.output import Output
from fastkv.engine.request import Request
from fastkv.engine.runtime import Runtime
from fastkv.errors import FastKVError
from fastkv.kernels.out_of_memory import REQUEST
from fastkv.models.text.tokenizer import Tokenizer

DEFAULT_BATCH_SIZE = 8


class Batch(OneReader[tuple[int, Output]]):
    """(index, output) of each request, as it is done (`run_batch`)."""

    def __init__(self, each: Generator[tuple[int, Output], None, None]) -> None:
        super().__init__()
        self._each = each

    def _next(self) -> tuple[int, Output]:
        return next(self._each)

    def _let_go(self) -> None:
        self._each.close()


def run_batch(
    runtime: Runtime,
    tokenizer: Tokenizer | None,
    requests: Sequence[Request],
    n_slots: int,
    called_at: float,
    kv_memory: int | None = None,
) -> Generator[tuple[int, Output], None, None]:
    """(index, output) of each request, as it is done; `n_slots` of them are at work at a time.

    called_at: time.perf_counter() when the user asked. Each prompt is prefilled on its own, as soon as there is a slot
    for it. kv_memory: bytes that all slots may take. Leaving the iterator early ends all of them.
    """
    answers = [Answer(runtime.model, tokenizer, request, called_at) for request in requests]
    with explain_out_of_memory(REQUEST):
        batch = DecodeBatch(runtime, requests, n_slots, kv_memory)
    waiting, at_work = deque(range(len(requests))), dict[int, int]()
    try:
        while waiting or at_work:
            with explain_out_of_memory(REQUEST):
                while waiting and batch.has_room:
                    index = waiting.popleft()
                    slot, result = batch.admit(requests[index])
                    answers[index].prefilled(result)
                    at_work[slot] = index
                batch.launch_as_needed()
                tokens = batch.read()
            for slot, token_id in tokens:
                index = at_work[slot]
                if answers[index].take(token_id)[1]:
                    answers[index].peak = peak_bytes(runtime.model.device)
                    batch.finish(slot, answers[index].token_ids, answers[index].text)
                    batch.release(slot)
                    del at_work[slot]
                    yield index, answers[index].output()
    finally:
        batch.close()


def slots_that_fit(runtime: Runtime, requests: Sequence[Request], batch_size: int, kv_memory: int | None = None) -> int:
    """How many of the requests can be at work at a time: at most `batch_size`, in `kv_memory` bytes of KV cache.

    kv_memory: None means what the device has left, less what the largest prefill takes. A slot has room for the
    largest request. Raises FastKVError if not even one fits.
    """
    most, one = min(batch_size, len(requests)), _slot_bytes(requests) + _index_bytes(requests)
    if kv_memory is not None and one > kv_memory:
        raise FastKVError(
            f"kv_memory must be at least {one:,} bytes ({-(-one // 2**20):,} MiB) for the largest of these prompts and "
            f"its answer, not {kv_memory:,}",
            setting="kv_memory",
        )
    return max(1, slots_there(runtime, requests, most, kv_memory))


def slots_there(
    runtime: Runtime, requests: Sequence[Request], most: int, kv_memory: int | None = None, held: int = 0
) -> int:
    """The same, of `most`, where what requests share takes `held` bytes of the memory: 0 if not even one fits."""
    one = _slot_bytes(requests)
    if kv_memory is not None:
        return min(most, max(0, kv_memory - held) // (one + _index_bytes(requests)))
    device, ranks = runtime.model.device, runtime.model.ranks
    available = share_of(available_bytes(device), ranks, device)
    found = most if available is None else _slots_in(available, runtime, requests, most, one, held)
    return found if ranks is None else ranks.least(found, device)


def _slot_bytes(requests: Sequence[Request]) -> int:
    """Bytes of a slot with room for the largest of them."""
    return bytes_of(layout_of(requests), capacities_of(requests), requests[0].plan.shape)


def _index_bytes(requests: Sequence[Request]) -> int:
    """Bytes of the largest index of a request whose steps read few of its entries; a footprint has it by itself."""
    return max(request.plan.index_nbytes for request in requests)


def _slots_in(available: int, runtime: Runtime, requests: Sequence[Request], most: int, one: int, held: int = 0) -> int:
    """How many slots of `one` bytes fit, of `most`, besides what the largest prefill takes: one runs at a time."""

    def of(request: Request, slots: int) -> Footprint:
        draws = request.params.temperature > 0
        return footprint(runtime.model, request.plan, slots * one + held, slots=slots, draws=draws)

    distinct = {request.sizes: request for request in requests}.values()
    largest = max(distinct, key=lambda request: of(request, 1).total)

    def lacks(slots: int) -> bool:
        needed = of(largest, slots)
        reusable = runtime.buffers.reusable(needed.cache - held, needed.workspace)
        return needed.total > available + reusable

    return bisect_left(range(1, most + 1), True, key=lacks)
