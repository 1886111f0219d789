"""What a machine gives at most, and how much of that was reached where it was measured. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

# Of an all-reduce of a few KB. Assumed, and nowhere measured: there was never more than one GPU.
ASSUMED_LATENCY = 10e-6


@dataclass(frozen=True)
class Link:
    """Between GPUs. bandwidth: bytes/s that each sends. latency: seconds that an all-reduce of a few bytes takes.

    source: where the bandwidth comes from.
    """

    bandwidth: float
    latency: float = ASSUMED_LATENCY
    source: str = "as given"


@dataclass(frozen=True)
class Reached:
    """What this engine reached in measured runs of one shape.

    products, attention: shares of the largest product's FLOP/s that a prefill's products and attention reach. reading:
    share of the copy's bytes/s with which weights and entries are read. layer_s: seconds that each layer takes
    besides, whatever is read; of a step, and taken to hold for a prefill. source: where the runs stand, in
    benchmarks/results.
    """

    products: float
    attention: float
    reading: float
    layer_s: float
    source: str

    @property
    def knows_layers(self) -> bool:
        return self.layer_s > 0


@dataclass(frozen=True)
class Machine:
    """One device, or several alike.

    kind: "cuda" or "cpu". memory: bytes of each that a plan may take; None: not known. flops: FLOP/s of a large
    product. bandwidth: bytes/s of memory; None: not known. dtypes: in which these were measured; () where a user gave
    them. told: where these two come from, for people; source: the file in benchmarks/results. link: None: not known.
    """

    name: str
    kind: str
    memory: int | None
    flops: float | None
    bandwidth: float | None
    reached: Reached
    told: str
    source: str | None = None
    link: Link | None = None
    dtypes: tuple[str, ...] = ()


# benchmarks/plan_times.py fits these figures to the measured runs, and prints what they give beside what was measured.
_ON_H200 = Reached(
    products=0.70,
    attention=0.68,
    reading=0.91,
    layer_s=58e-6,
    source="2026-11-28-gpu-h200.json and 2026-11-27-gpu-h200-million.json, llama-3.1-8b in bfloat16",
)
# Means of prefill_of_ceiling and decode_of_ceiling of the two policies.
ON_CPU = Reached(
    products=0.67,
    attention=0.67,
    reading=0.55,
    layer_s=0.0,  # not known: differs from machine to machine, and --measure measures it
    source="2026-11-27-cpu-float32.json, llama-100m in float32",
)

MACHINES: dict[str, Machine] = {
    "h200": Machine(
        name="h200",
        kind="cuda",
        memory=143_771 << 20,  # what nvidia-smi says
        flops=7.74e14,  # the steps product and copy
        bandwidth=4.233e12,
        reached=_ON_H200,
        told="what was measured on one H200",
        source="2026-11-28-gpu-h200.json",
        link=Link(450e9, source="of NVLink, as published"),
        dtypes=("bfloat16", "float16"),
    )
}
