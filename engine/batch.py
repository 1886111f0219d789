"""Many requests, decoded together: whoever is done leaves, and whoever waits takes the place (continuous batching)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from fastkv.cache.storage import bucket
from fastkv.engine.answer import Answer
from fastkv.engine.memory import available_bytes, explain_out_of_memory, peak_bytes
from fastkv.engine.output import Output
from fastkv.engine.request import Request
from fastkv.engine.rows import Rows, slots_of_all
from fastkv.engine.runtime import Runtime
from fastkv.errors import FastKVError
from fastkv.models.tokenizer import Tokenizer

DEFAULT_BATCH_SIZE = 8


def run_batch(
    runtime: Runtime, tokenizer: Tokenizer | None, requests: Sequence[Request], n_rows: int, called_at: float
) -> Iterator[tuple[int, Output]]:
    """(index, output) of each request, as it is done; `n_rows` of them are at work at a time.

    called_at: time.perf_counter() when the user asked. Each prompt is prefilled on its own, as soon as there is a row
    for it. Leaving the iterator early ends all of them.
    """
    model = runtime.model
    answers = [Answer(model.config, model.dtype, model.device, tokenizer, one, called_at) for one in requests]
    with explain_out_of_memory():
        rows = Rows(runtime, requests, n_rows)
    waiting, at_work = deque(range(len(requests))), dict[int, int]()
    try:
        while waiting or at_work:
            with explain_out_of_memory():
                while waiting and rows.has_room:
                    _admit(rows, at_work, waiting.popleft(), answers)
                rows.launch_as_needed()
                tokens = rows.read()
            for row, token_id in tokens:
                index = at_work[row]
                if answers[index].take(token_id)[1]:
                    answers[index].peak = peak_bytes(runtime.model.device)
                    rows.release(row)
                    del at_work[row]
                    yield index, answers[index].output()
    finally:
        rows.close()


def _admit(rows: Rows, at_work: dict[int, int], index: int, answers: Sequence[Answer]) -> None:
    row, result = rows.admit(answers[index].request)
    answers[index].prefilled(result.cache.nbytes, result.cache.entries, result.layer_tokens)
    at_work[row] = index


def rows_that_fit(runtime: Runtime, requests: Sequence[Request], batch_size: int, kv_memory: int | None = None) -> int:
    """How many of the requests can be at work at a time: at most `batch_size`, in `kv_memory` bytes of KV cache.

    kv_memory: None means what the device has left. A row has room for the largest request. Raises FastKVError if not
    even one fits.
    """
    model = runtime.model
    slots = sum(bucket(count) for count in slots_of_all(requests, model.config.n_layers))
    one = 2 * slots * model.config.n_kv_heads * model.config.head_dim * model.dtype.itemsize
    if kv_memory is None:
        available = available_bytes(model.device)
        limit = batch_size if available is None else (available + runtime.pool.idle_bytes) // one
        return max(1, min(batch_size, len(requests), limit))
    if one > kv_memory:
        raise FastKVError(
            f"kv_memory must be at least {one:,} bytes ({-(-one // 2**20):,} MiB) for the largest of these prompts and "
            f"its answer, not {kv_memory:,}",
            setting="kv_memory",
        )
    return min(batch_size, len(requests), kv_memory // one)
