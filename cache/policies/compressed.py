"""What methods share that keep a part of the prompt's KV: the budget's settings, and the vote of the last tokens."""

from __future__ import annotations

from torch import Tensor

from fastkv.cache.policy import Observation, Policy
from fastkv.cache.scores import POOLINGS, window_scores
from fastkv.errors import FastKVError, check_choice, check_integer, check_number

MAX_KERNEL = 4095


def check_kernel(kernel: int) -> None:
    """Raise FastKVError unless it is the width of a pooling that leaves the length as it is."""
    check_integer("kernel", kernel, 1, MAX_KERNEL)
    if kernel % 2 == 0:
        raise FastKVError(f"kernel must be odd, not {kernel}", setting="kernel")


class Compressed(Policy):
    """A policy whose fields include these two; a rate gives int(rate * n_tokens), floored by min_tokens.

    kv_retention: share of the prompt that a layer keeps for each KV head, in (0, 1]; 1 keeps all it saw.
    kv_len: the same as an absolute number of tokens; it wins over the rate, and no floor applies to it.
    min_tokens: floor of what the rate gives (never above the prompt), so that short prompts are not hurt.
    """

    kv_retention: float
    kv_len: int | None
    min_tokens: int

    def check_budget(self) -> None:
        """Raise FastKVError for a value out of range, or below what is always kept."""
        check_number("kv_retention", self.kv_retention, 0, 1, above=True)
        if self.kv_len is not None:
            self.check_holds_window("kv_len", self.kv_len)
        self.check_holds_window("min_tokens", self.min_tokens)

    def check_holds_window(self, name: str, value: int) -> None:
        """FastKVError if a number of tokens has no room for those that are always kept."""
        check_integer(name, value, 1)
        if value < self.window:
            raise FastKVError(
                f"{name} must be at least the window ({self.window}), which is always kept, not {value}", setting=name
            )

    def count(self, length: int | None, rate: float, n_tokens: int) -> int:
        """Tokens that an absolute length or a rate means for a prompt of `n_tokens`."""
        wanted = max(int(rate * n_tokens), self.min_tokens) if length is None else length
        return min(wanted, n_tokens)

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return self.count(self.kv_len, self.kv_retention, n_tokens)


class WindowScored(Compressed):
    """Compressed by the vote of the last tokens (arXiv 2404.14469).

    window: the last tokens, always kept, whose queries score the others. kernel, pooling: smoothing of the scores.
    """

    kernel: int
    pooling: str

    def check_scoring(self) -> None:
        """Raise FastKVError for a value out of range."""
        check_integer("window", self.window, 1)
        check_kernel(self.kernel)
        check_choice("pooling", self.pooling, POOLINGS)

    def score(self, observed: Observation) -> Tensor:
        return window_scores(observed.q, observed.k, self.window, self.kernel, self.pooling)
