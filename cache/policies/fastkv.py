"""FastKV: decoupled context reduction and KV compression (arXiv 2502.01068), with scores that real chat models need."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastkv.cache.policies.compressed import MAX_KERNEL
from fastkv.cache.policies.window_scored import WindowScored
from fastkv.cache.policy import Observation, Policy, Stage
from fastkv.cache.setting import number, one_or_more, redefined, setting, whole
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    from torch import Tensor

# How the paper scores.
PAPER: dict[str, Any] = {
    "window": 8,
    "tsp_window": 0,
    "queries": "sum",
    "pooling": "max",
    "kernel": 7,
    "values": False,
    "sinks": 0,
    "share": 0.0,
    "narrow": 0.0,
}

TSP_WINDOW_HELP = "--window of the choice of these tokens, at least --window and at most half of them"
NARROW_HELP = "with --pooling forward: share of each budget that the max of --kernel neighbours chooses instead"
# Passages, each a token and the `reach` after it, that a budget has room for before any of it is narrow: with fewer,
# answers of 14 digits break off (docs/accuracy.md).
_LEAST_PASSAGES = 3


@dataclass(frozen=True, kw_only=True)
class FastKV(WindowScored):
    """Full context up to the TSP layer, the informative tokens after it, and a small share of KV in every layer.

    tsp_layer: the layer after whose attention tokens are dropped; None means max(0, L // 2 - 1) of L layers.
    tsp_rate: share of the prompt that is propagated after it, in (0, 1]; 1 turns TSP off.
    Several reductions down the stack are a tuple of layers, and of rates or lengths that fall: tsp_layer=(9, 15, 23),
    tsp_rate=(0.5, 0.2, 0.1). At each of these layers its own scores choose from the tokens that are left.
    kv_retention: share of the prompt that each layer keeps for each KV head, in (0, 1]; 1 keeps all it saw.
    tsp_len, kv_len: the same as absolute numbers of tokens; they win over the rates, and no floor applies to them.
    min_tokens: floor of what the rates give (never above the prompt), so that short prompts are not hurt.
    window, queries, pooling, kernel, reach, values, sinks, share: the scores (see WindowScored). tsp_reach: `reach` of
    the scores that choose the propagated tokens; None means the same.
    tsp_window: the last tokens that choose the propagated ones, and are among them: at least the window, else at most
    half of them. A question is longer than the window, which takes room that entries need; here there is room.
    narrow: with pooling="forward", the share of each budget (of entries and of propagated tokens, the window left out)
    that is chosen by scores pooled by the maximum of `kernel` neighbours, of which nothing is shared. Forward pooling
    keeps long passages after few tokens; this part keeps short ones around many, which a question about several places
    needs. As many tokens as three passages have are never chosen so.

    What differs from the paper: the defaults of the scores. `FastKV.paper()` has the paper's own, under which a real
    chat model loses most long answers at a tenth of its cache (docs/accuracy.md).

    Raises FastKVError for a value out of range. A rate gives int(rate * n_tokens).

    Known weakness: only the prompt's last tokens score. A prompt whose question is not in it, or comes first, keeps the
    wrong tokens.
    """

    name: ClassVar[str] = "fastkv"
    compresses_again: ClassVar[bool] = True
    scores_on_host: ClassVar[bool] = True

    tsp_layer: int | tuple[int, ...] | None = setting(
        None,
        one_or_more(whole(0)),
        "layer after whose attention tokens are dropped, or several: I,I,…",
        metavar="I",
        unset="half way up",
    )
    tsp_rate: float | tuple[float, ...] = setting(
        0.2,
        one_or_more(number(0, 1, above=True)),
        "share of the prompt that is propagated after it; 1 turns TSP off; falling with several layers: R,R,…",
        metavar="R",
    )
    tsp_len: int | tuple[int, ...] | None = setting(
        None, one_or_more(whole(1)), "tokens that are propagated, in place of --tsp-rate", metavar="N"
    )
    tsp_reach: int | None = setting(
        None, whole(0, MAX_KERNEL), "--reach of the scores that choose these tokens", metavar="N", unset="the same"
    )
    tsp_window: int = setting(24, whole(0, MAX_KERNEL), TSP_WINDOW_HELP, metavar="W")
    # Chosen by measurement on real chat models, on texts of their own: docs/accuracy.md.
    window: int = redefined(WindowScored, "window", 10)
    queries: str = redefined(WindowScored, "queries", "max")
    pooling: str = redefined(WindowScored, "pooling", "forward")
    values: bool = redefined(WindowScored, "values", True)
    sinks: int = redefined(WindowScored, "sinks", 1)
    share: float = redefined(WindowScored, "share", 1.0)
    narrow: float = setting(0.8, number(0, 1), NARROW_HELP, metavar="R")

    @classmethod
    def paper(cls, **settings: Any) -> FastKV:
        """The paper's scores (arXiv 2502.01068); `settings` are any others. Raises FastKVError as FastKV does."""
        return cls(**{**PAPER, **settings})

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, lengths = _each(self.tsp_layer), _each(self.tsp_len)
        for length in lengths:
            self.check_holds_window("tsp_len", length)
        name, shares = ("tsp_len", lengths) if lengths else ("tsp_rate", _each(self.tsp_rate))
        if list(layers) != sorted(set(layers)):
            raise FastKVError(f"tsp_layer must rise, not {self.tsp_layer}", setting="tsp_layer")
        if list(shares) != sorted(set(shares), reverse=True):
            raise FastKVError(f"{name} must fall, not {getattr(self, name)}", setting=name)
        if len(shares) != max(1, len(layers)):
            raise FastKVError(
                f"{name} must have a value for each TSP layer: {len(shares)} for {max(1, len(layers))}", setting=name
            )

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        layer = self.tsp_layers_of(n_layers)[-1]
        if layer >= n_layers:
            raise FastKVError(
                f"tsp_layer must be below the model's number of layers ({n_layers}), not {layer}", setting="tsp_layer"
            )

    def settings(self, n_layers: int) -> dict[str, Any]:
        layers = self.tsp_layers_of(n_layers)
        return super().settings(n_layers) | {"tsp_layer": layers if isinstance(self.tsp_layer, tuple) else layers[0]}

    def tsp_layer_of(self, n_layers: int) -> int:
        """The (first) TSP layer in a model of `n_layers`, the default worked out."""
        return self.tsp_layers_of(n_layers)[0]

    def tsp_layers_of(self, n_layers: int) -> tuple[int, ...]:
        """The TSP layers in a model of `n_layers`, the default worked out."""
        return _each(self.tsp_layer) or (max(0, n_layers // 2 - 1),)

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        made: list[Stage] = []
        first, seen = 0, n_tokens
        for layer, keep in zip(self.tsp_layers_of(n_layers), self._propagated(n_tokens), strict=True):
            if keep < seen and layer + 1 < n_layers:
                made.append(Stage(range(first, layer + 1), keep))
                first, seen = layer + 1, keep
        return [*made, Stage(range(first, n_layers))]

    def covering(self, tail: int, n_tokens: int) -> Policy:
        policy = self
        if self.tsp_window and tail:
            policy = dataclasses.replace(self, tsp_window=min(self.tsp_window + tail, MAX_KERNEL))
        return WindowScored.covering(policy, tail, n_tokens)

    def received(self, observed: Observation) -> Tensor:
        if "received" not in observed.noted:
            observed.noted["received"] = super().received(observed)
        return observed.noted["received"]

    def ranking(self, observed: Observation, scores: Tensor, counts: Tensor | int) -> Tensor:
        if not self.narrows:
            return scores
        return self._with_narrow(scores, self._narrow_scores(observed), counts - self.window, self.reach)

    @property
    def n_queries(self) -> int:
        return max(self.window, self.tsp_window)

    def window_of_tsp(self, observed: Observation, count: int | None) -> int:
        """How many of the last tokens choose those that are propagated: `count` of them, None for what TSP propagates.

        At most half of these, but never fewer than the window.
        """
        if count is None:
            count = self._propagated(observed.k.shape[2] - observed.n_past)[0]
        return max(self.window, min(self.tsp_window, count // 2, observed.q.shape[2]))

    def tsp_scores(self, observed: Observation, scores: Tensor, window: int) -> Tensor:
        """Scores of the new tokens by the last `window` queries, with the reach of TSP: [B, Hkv, T - window].

        scores: those of the entries, which these may be.
        """
        reach = self._reach_of_tsp
        if window != self.window or reach != self.reach:
            scores = self.smoothed(observed, self._received_from(observed, window), reach)
        return scores[..., observed.n_past :]

    def importance(self, observed: Observation, scores: Tensor, count: int | None) -> Tensor:
        from torch.nn.functional import pad

        window = self.window_of_tsp(observed, count)
        chosen_by = observed.all_heads(self.tsp_scores(observed, scores, window))
        if count is not None and self.narrows:
            received = None if window == self.window else self._received_from(observed, window)
            narrow = self._narrow_scores(observed) if received is None else self.smoothed(observed, received, None)
            narrow = observed.all_heads(narrow[..., observed.n_past :]).sum(dim=1, keepdim=True)
            wide = chosen_by.sum(dim=1, keepdim=True)
            chosen_by = self._with_narrow(wide, narrow, count - window, self._reach_of_tsp)
        return pad(chosen_by, (0, window - self.window), value=float("inf"))  # as good as in the window

    @property
    def _reach_of_tsp(self) -> int:
        return self.reach if self.tsp_reach is None else self.tsp_reach

    @property
    def narrows(self) -> bool:
        """Whether a part of the budgets is chosen by narrow pooling."""
        return self.narrow > 0 and self.pooling == "forward"

    def _narrow_scores(self, observed: Observation) -> Tensor:
        if "narrow" not in observed.noted:
            observed.noted["narrow"] = self.scores(observed, None, None)
        return observed.noted["narrow"]

    def _received_from(self, observed: Observation, window: int) -> Tensor:
        """What another number of last queries attends to: float32 [B, Hkv, G, n_past + T - window]."""
        if window == self.window:
            return self.received(observed)
        from fastkv.cache.scores import window_attention

        name = f"received by {window}"
        if name not in observed.noted:
            attention = window_attention(observed.q, observed.k, window)
            observed.noted[name] = self._received(observed, attention, window)
        return observed.noted[name]

    def _with_narrow(self, wide: Tensor, narrow: Tensor, count: Tensor | int, reach: int) -> Tensor:
        """Scores [B, H, n] whose best `count` are the best by `wide`, and for the rest those by `narrow`.

        count: one, or int64 [B, H]; the window is not in it.
        """
        from fastkv.cache.scores import best

        least = _LEAST_PASSAGES * (reach + 1)
        if isinstance(count, int):
            n_wide: Tensor | int = min(count, max(count - int(self.narrow * count), least))
        else:
            n_wide = (count - (self.narrow * count).long()).clamp(min=least).minimum(count)
        return narrow.masked_fill(best(wide, n_wide), float("inf"))

    def least_budget(self, n_tokens: int) -> int:
        return min(super().least_budget(n_tokens), *self._propagated(n_tokens))

    def _propagated(self, n_tokens: int) -> list[int]:
        """How many tokens are propagated after each TSP layer."""
        if self.tsp_len is not None:
            return [self.count(length, 1.0, n_tokens) for length in _each(self.tsp_len)]
        return [self.count(None, rate, n_tokens) for rate in _each(self.tsp_rate)]


def _each(value: Any) -> tuple[Any, ...]:
    """The values of a setting that may be one, several or None."""
    return value if isinstance(value, tuple) else () if value is None else (value,)
