"""What methods share that keep a part of the prompt's KV: the budget's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkv.cache.policy import Policy
from fastkv.cache.setting import Values, number, setting, whole
from fastkv.errors import FastKVError, check_integer

MAX_KERNEL = 4095
WINDOW_HELP = "last tokens, always kept, whose queries score the others"
MIN_TOKENS_HELP = "the rates never keep fewer tokens than this"


def odd_width() -> Values:
    """The widths of a pooling that leaves the length as it is."""

    def check(name: str, value: Any) -> Any:
        check_integer(name, value, 1, MAX_KERNEL)
        if value % 2 == 0:
            raise FastKVError(f"{name} must be odd, not {value}", setting=name)
        return value

    return Values(int, check)


@dataclass(frozen=True, kw_only=True)
class Compressed(Policy):
    """A policy with a budget for each layer; a rate gives int(rate * n_tokens), floored by min_tokens.

    kv_retention: share of the prompt that a layer keeps for each KV head, in (0, 1]; 1 keeps all it saw.
    kv_len: the same as an absolute number of tokens; it wins over the rate, and no floor applies to it.
    min_tokens: floor of what the rate gives (never above the prompt), so that short prompts are not hurt. The window,
    which is always kept, is a floor, too.
    """

    kv_retention: float = setting(
        0.1, number(0, 1, above=True), "share of the prompt whose KV each layer keeps; 1 keeps all", metavar="R"
    )
    kv_len: int | None = setting(
        None, whole(1), "entries that each layer keeps, in place of --kv-retention", metavar="N"
    )
    min_tokens: int = setting(128, whole(1), MIN_TOKENS_HELP, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_holds_window("kv_len", self.kv_len)

    def check_holds_window(self, name: str, value: int | None) -> None:
        """FastKVError if a number of tokens (None: unset) has no room for those that are always kept."""
        if value is not None and value < self.window:
            raise FastKVError(
                f"{name} must be at least the window ({self.window}), which is always kept, not {value}", setting=name
            )

    def count(self, length: int | None, rate: float, n_tokens: int) -> int:
        """Tokens that an absolute length or a rate means for a prompt of `n_tokens`."""
        wanted = max(int(rate * n_tokens), self.min_tokens, self.window) if length is None else length
        return min(wanted, n_tokens)

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        return self.count(self.kv_len, self.kv_retention, n_tokens)
