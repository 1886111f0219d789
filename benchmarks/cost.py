"""What this machine could do (engine/planning/ceilings.py), by the names that the benchmarks use."""

from __future__ import annotations

from fastkv.engine.planning.ceilings import Ceilings, measure_ceilings, wait_for

__all__ = ["Ceilings", "measure_ceilings", "wait_for"]
