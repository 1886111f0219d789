"""How long a planned request would take, by the cost model: what must be computed, read and sent, by what a machine
reached where it was measured. Nothing overlaps in this model, and sliding windows are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastkv.engine.cost import Work, first_pass_work, leaving, prefill_work
from fastkv.engine.planning.machine import Machine
from fastkv.engine.planning.planned import Planned, matrix_bytes
from fastkv.engine.projection import CHUNK

Parts = dict[str, float]  # seconds, by what they are for


@dataclass(frozen=True)
class Expected:
    """Seconds to the first token of one prompt, and of one step of all sequences in the middle of their answers.

    None where that is not known; `unknown` says why. notes: what the figures leave out.
    """

    first: Parts | None
    step: Parts | None
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Sent(NamedTuple):
    """What ranks add up, or gather: how many times, and bytes of all of them."""

    times: int
    nbytes: float


def expected(plan: Planned, machine: Machine) -> Expected:
    """What the cost model gives for a plan on a machine."""
    both, of_steps = _unknown(plan, machine)
    first = None if both else first_token(plan, machine)
    step = None if both or of_steps else decode_step(plan, machine)
    return Expected(first, step, (*both, *of_steps), _notes(plan, machine))


def first_token(plan: Planned, machine: Machine) -> Parts:
    """Seconds of the prefill of one prompt, by what they are for. The machine's figures must be known.

    Products take at least as long as reading their weights. A layer is taken to cost what it does in a step besides.
    """
    assert machine.flops is not None
    assert machine.bandwidth is not None
    work, reached, layers = _work(plan), machine.reached, _layers_run(plan)
    read = _weights_read(plan) * layers / plan.wanted.config.n_layers
    return {
        "products": max(
            work.products / (reached.products * machine.flops), read / (reached.reading * machine.bandwidth)
        ),
        "attention": work.attention / (reached.attention * machine.flops),
        **_small_kernels(layers, machine),
        **_reduces(plan, machine, _sent_by_prefill(plan)),
    }


def decode_step(plan: Planned, machine: Machine) -> Parts:
    """Seconds of one step of all sequences together, by what they are for."""
    assert machine.flops is not None
    assert machine.bandwidth is not None
    wanted, reached = plan.wanted, machine.reached
    speed = reached.reading * machine.bandwidth
    values = _weights_read(plan) / wanted.dtype.itemsize
    multiplied = 2.0 * wanted.batch * values / (reached.products * machine.flops)
    hidden = wanted.batch * wanted.config.hidden_size * wanted.dtype.itemsize
    times = 2 * wanted.config.n_layers + 2  # each layer's two, the embedding, and the logits
    sent = _Sent(times, (times - 1) * hidden + wanted.batch * wanted.config.vocab_size * wanted.dtype.itemsize)
    return {
        "weights": max(_weights_read(plan) / speed, multiplied),
        "entries": wanted.batch * entries_read(plan) / speed,
        **_small_kernels(wanted.config.n_layers, machine),
        **_reduces(plan, machine, sent),
    }


def _small_kernels(n_layers: int, machine: Machine) -> Parts:
    """Seconds of what layers cost besides; on a CPU nothing is said where that is not known."""
    if machine.kind == "cpu" and not machine.reached.knows_layers:
        return {}
    return {"small kernels": n_layers * machine.reached.layer_s}


def entries_read(plan: Planned) -> int:
    """Bytes of K and V, and of what chooses among them, that a step reads of one sequence amid its answer."""
    request, total = plan.request, 0
    appended = request.max_tokens // 2
    budget = request.policy.read_budget(request.start + request.n_tokens + appended)
    for layer, few, capacity in zip(request.layers, request.reads_few, request.capacities, strict=True):
        entries = min(layer.kept + appended, capacity)
        total += min(entries, budget) if few else entries
    shape = request.shape
    return total * 2 * shape.n_kv_heads * shape.head_dim * shape.dtype.itemsize + request.index_nbytes


def _weights_read(plan: Planned) -> int:
    """Bytes of a rank's matrices: all but an embedding of its own, of which a step reads a row."""
    stored, dtype = plan.wanted.stored, plan.wanted.dtype
    embedding = 0 if stored.tie_word_embeddings else stored.vocab_size * stored.hidden_size * dtype.itemsize
    return matrix_bytes(stored, dtype) - embedding


def _work(plan: Planned) -> Work:
    """Of one rank: of the prefill, of what chooses tokens before it, and of a probe after it."""
    request, stored = plan.request, plan.wanted.stored
    works = [prefill_work(stored, request.layers)]
    if request.first_pass is not None:
        works.append(first_pass_work(stored, request.first_pass.layer, request.n_tokens))
    if request.probe is not None:  # the prompt again, each part of which attends to all of it
        works.append(Work(works[0].products, 2 * works[0].attention))
    return Work(sum(work.products for work in works), sum(work.attention for work in works))


def _layers_run(plan: Planned) -> int:
    """Layers that a prefill goes through: all, those of what chooses tokens before it, and of a probe after it."""
    request, n_layers = plan.request, plan.wanted.config.n_layers
    first_pass = 0 if request.first_pass is None else request.first_pass.layer
    return n_layers + first_pass + (0 if request.probe is None else n_layers)


def _sent_by_prefill(plan: Planned) -> _Sent:
    request, config = plan.request, plan.wanted.config
    row = config.hidden_size * plan.wanted.dtype.itemsize
    tokens = [(1, request.layers[0].seen)]  # the embedding
    tokens += [(2, leaving(request.layers, layer)) for layer in range(config.n_layers)]
    if request.first_pass is not None:
        tokens += [(1 + 2 * request.first_pass.layer, request.n_tokens)]
    times = sum(count * -(-n // CHUNK) for count, n in tokens)
    nbytes = sum(count * n * row for count, n in tokens) + config.vocab_size * plan.wanted.dtype.itemsize
    return _Sent(times + 1, nbytes)


def _reduces(plan: Planned, machine: Machine, sent: _Sent) -> Parts:
    """Seconds of all-reduces in a ring, in which each rank sends nearly twice what is added up; none by one rank."""
    ranks = plan.wanted.ranks
    if ranks == 1:
        return {}
    assert machine.link is not None
    in_ring = 2.0 * (ranks - 1) / ranks
    return {"all-reduces": sent.times * machine.link.latency + in_ring * sent.nbytes / machine.link.bandwidth}


def _unknown(plan: Planned, machine: Machine) -> tuple[list[str], list[str]]:
    """Why times are not known: all of them, and those of steps alone."""
    wanted, both, of_steps = plan.wanted, [], []
    dtype = str(wanted.dtype).removeprefix("torch.")
    if machine.flops is None or machine.bandwidth is None:
        both.append("its FLOP/s and memory bandwidth are not known: add --measure, or --flops and --bandwidth")
    elif machine.dtypes and dtype not in machine.dtypes:
        both.append(f"{machine.name} was not measured in {dtype}: give its --flops")
    if wanted.ranks > 1 and machine.link is None:
        both.append("how fast ranks send is not known: give --link")
    if wanted.weights is not None:
        both.append("products with int8 weights were not measured in this model of time")
    if wanted.kv_dtype is not None:
        of_steps.append("steps over packed entries were not measured in this model of time")
    if plan.request.eager and machine.kind == "cuda":
        of_steps.append(f"steps of {plan.request.eager.rstrip(',')} are not replayed as graphs, and were not measured")
    return both, of_steps


def _notes(plan: Planned, machine: Machine) -> tuple[str, ...]:
    policy, notes = plan.request.policy, []
    if machine.kind == "cpu" and machine.flops is not None and not machine.reached.knows_layers:
        notes.append("times are without what each layer costs besides: small models are slower; --measure measures it")
    if plan.wanted.device.type == "cpu":
        notes.append("the C library may keep freed blocks: processes took up to 21 % more than planned (docs/plan.md)")
    if plan.request.compresses and (policy.needs_all_queries or plan.request.probe is not None):
        notes.append(f"what policy {policy.name} computes to score the prompt is not counted: its first token is later")
    if plan.request.layout.per_head and plan.wanted.device.type == "cuda":
        notes.append("steps over heads of different lengths are slower (1.3 times, measured once); that is not counted")
    if policy.per_head and plan.request.compresses and plan.wanted.ranks > 1:
        notes.append(
            "heads of all GPUs compete for entries: each has room for winning them all, and reads its share on average"
        )
    return tuple(notes)
