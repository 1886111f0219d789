"""What one request leaves for the next to use again: activations, slots, and the graphs that are bound to them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from fastkv.cache.layer import EntryShape, KVLayer
from fastkv.cache.layer_map import Sources
from fastkv.cache.pool import KVPool, bytes_of
from fastkv.engine.step import SlotState, Stepper
from fastkv.engine.workspace import Workspace
from fastkv.models.llama import Llama


class Buffers:
    """All that some running requests need and the next ones can use again."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.state: SlotState | None = None
        self.stepper: Stepper | None = None  # bound to the state

    @property
    def nbytes(self) -> int:
        return self.workspace.nbytes + (self.state.pool.nbytes if self.state is not None else 0)

    def state_for(
        self,
        layout: type[KVLayer],
        capacities: Sequence[int],
        n_slots: int,
        model: Llama,
        limit: int | None = None,
        shared: Sources = (),
    ) -> SlotState:
        """Slots for `n_slots` sequences and at least `capacities` entries a layer: those there are, or larger ones.

        limit: bytes that all slots may take; what is asked for takes no more (None: no limit). shared: see KVPool.
        """
        known, config = self.state, model.config
        shape = EntryShape(config.n_kv_heads, config.head_dim, model.dtype)
        if known is not None and known.pool.shared != shared:
            known = None
        if known is not None and known.pool.holds(layout, capacities, n_slots):
            if limit is None or known.pool.nbytes <= limit:
                return known
        elif known is not None and known.pool.layout is layout and n_slots == known.pool.n_slots:
            # Sequences grow longer: be ready for both.
            both = [max(pair) for pair in zip(capacities, known.pool.capacities, strict=True)]
            if limit is None or n_slots * bytes_of(layout, both, shape) <= limit:
                capacities = both
        del known
        self.stepper = self.state = None  # the old slots go first, and with them the graphs that are bound to them
        pool = KVPool(layout, capacities, n_slots, shape, model.device, shared)
        self.state = SlotState.of(pool, config.vocab_size)
        return self.state


class BufferPool:
    """The buffers that no request is using. One set is kept: requests usually come one after another."""

    def __init__(self) -> None:
        self._idle: Buffers | None = None
        self._lock = threading.RLock()  # a garbage collection may give back what nobody holds, in here

    @property
    def idle_bytes(self) -> int:
        """What the next request can use without asking the system for it."""
        idle = self._idle
        return idle.nbytes if idle is not None else 0

    def reusable(self, cache: int, workspace: Mapping[str, int]) -> int:
        """Bytes that it need not ask for, of a cache and of a workspace of these sizes by name."""
        idle = self._idle
        if idle is None:
            return 0
        pool = 0 if idle.state is None else idle.state.pool.nbytes
        return min(pool, cache) + idle.workspace.reusable(workspace)

    def lease(self) -> Buffers:
        """Buffers for one caller alone. A second one at the same time gets new ones."""
        with self._lock:
            buffers, self._idle = self._idle, None
        return Buffers() if buffers is None else buffers

    def give_back(self, buffers: Buffers) -> None:
        """Keep them for the next request; of two sets, the larger."""
        with self._lock:
            if self._idle is None or self._idle.nbytes <= buffers.nbytes:
                self._idle = buffers

    def clear(self) -> None:
        """Let the idle memory go."""
        with self._lock:
            self._idle = None
