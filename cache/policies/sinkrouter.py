"""SinkRouter: a step skips the heads whose queries all go to the first token (arXiv 2604.16883)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastkv.cache.policies.read_few import ReadFew
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.setting import number, redefined, setting

if TYPE_CHECKING:
    import torch

    from fastkv.cache.reader import Index, IndexSizes

TAU_HELP = "cosine of a step's queries and the first key above which a head is skipped; above 1: never"


@dataclass(frozen=True, kw_only=True)
class SinkRouter(ReadFew):
    """Attention to the first token adds next to nothing: its value is short. Such a head's output is 0, and no read.

    tau: a KV head is skipped where the cosine between the first entry's key and each query of its group is above this;
    above 1 no head ever is. Skipping changes a head's output by its length, which is at most a |v0| + (1 - a) max |v|,
    where a is what the first entry would have received of the attention. The paper does not tell its threshold, which
    depends on the model: the default is a guess, not a measurement, so calibrate it on your model. What steps have read
    is in the figures (Metrics.read_bytes). The other settings are ReadFew's.

    Raises FastKVError for a value out of range.
    """

    name: ClassVar[str] = "sinkrouter"

    sinks: int = redefined(WindowScored, "sinks", 1)
    tau: float = setting(0.9, number(0, above=True), TAU_HELP, metavar="X")

    def reads_few(self, layer: int, n_entries: int, n_tokens: int) -> bool:
        return super().reads_few(layer, n_entries, n_tokens) and self.tau <= 1

    def index(self, layer: int, sizes: IndexSizes, device: torch.device) -> Index:
        from fastkv.cache.first_key import FirstKey

        return FirstKey(sizes, device, self.tau)

    def index_bytes(self, layer: int, sizes: IndexSizes) -> tuple[int, int]:
        from fastkv.cache.first_key import FirstKey

        held = FirstKey.bytes_of(sizes)
        return held, 2 * held
