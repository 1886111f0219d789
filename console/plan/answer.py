"""The plan as one value: whether it fits, what limits it, and what would change it. What text and JSON are made of."""

from __future__ import annotations

from dataclasses import dataclass

from fastkv.console.plan.changes import Change, Longest, changes, fits, longest, narrowly
from fastkv.engine.planning.expected import Expected, Parts, expected
from fastkv.engine.planning.machine import Machine
from fastkv.engine.planning.planned import Offloaded, Planned, offloaded

# What a part of the time is bound by.
BOUND_BY = {
    "products": "compute",
    "attention": "compute",
    "all-reduces": "interconnect",
    "weights": "memory bandwidth",
    "entries": "memory bandwidth",
    "small kernels": "launches, whatever is read",
}


@dataclass(frozen=True)
class Answer:
    """A plan on a machine. offload: where that makes fit what does not; longest: None where nothing fits."""

    plan: Planned
    machine: Machine
    times: Expected
    changes: tuple[Change, ...]
    longest: Longest | None
    offload: Offloaded | None

    @property
    def fits(self) -> bool:
        return fits(self.plan.total, self.machine.memory)

    @property
    def narrow(self) -> bool:
        """Whether it fits by less than the figures may be off."""
        return narrowly(self.plan.total, self.machine.memory)

    @property
    def time_limits(self) -> dict[str, str]:
        """The largest part of each time that is known, where all parts are: "first_token", "decode"."""
        if self.machine.kind == "cpu" and not self.machine.reached.knows_layers:
            return {}
        times = {"first_token": self.times.first, "decode": self.times.step}
        return {what: largest(parts) for what, parts in times.items() if parts is not None}

    @property
    def memory_limit(self) -> str:
        """What takes most of a rank's memory."""
        return largest(memory_parts(self.plan))


def answer_of(plan: Planned, machine: Machine) -> Answer:
    """All that is said of a plan."""
    memory = machine.memory
    return Answer(
        plan=plan,
        machine=machine,
        times=expected(plan, machine),
        changes=tuple(changes(plan, machine)),
        longest=None if memory is None else longest(plan, memory),
        offload=None if fits(plan.total, memory) or memory is None else _offload(plan, memory),
    )


def _offload(plan: Planned, memory: int) -> Offloaded | None:
    """Where one GPU's memory is enough for all but the prompt's hidden states and one layer's K/V; of several, none."""
    if plan.wanted.device.type == "cpu" or plan.wanted.ranks > 1:  # refused with several
        return None
    return next((way for way in offloaded(plan) if way.device <= memory), None)


def memory_parts(plan: Planned) -> Parts:
    """Bytes of a rank, by what they are for."""
    return {"weights": plan.weights, "KV cache": plan.needs.cache, "working memory": plan.working}


def working_parts(plan: Planned) -> Parts:
    """Bytes of the working memory, by what they are for."""
    buffers = plan.needs.workspace
    hidden = buffers.get("hidden", 0) + buffers.get("other hidden", 0)
    parts = {
        "hidden states": hidden,
        "K, V and queries of a layer": plan.needs.buffers - hidden,
        "K and V of all layers until the policy chooses": plan.needs.held,
        "scratch for a layer": plan.needs.step,
        "positions": plan.needs.lists,
        "blocks of products": plan.products,
    }
    return {name: size for name, size in parts.items() if size}


def largest(parts: Parts) -> str:
    """The name of the largest part."""
    return max(parts, key=lambda name: parts[name])
