"""What a policy decides: which tokens are propagated to later layers, and which entries each layer's cache keeps.

The two decisions of FastKV are two methods that never look at each other: `stages` reduces the context (prefill
compute), `budget` the cache (decode memory). Both count from the original prompt length. docs/policies.md shows how to
write one. Imports torch for type checkers only, so that the command's --help can tell every policy's settings at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fastkv.cache.setting import check_settings
from fastkv.errors import FastKVError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastkv.cache.layer import KVLayer
    from fastkv.cache.reader import Index, IndexSizes


@dataclass(frozen=True)
class Stage:
    """A range of layers that share one token set; `keep` tokens are propagated after its last layer (None: all)."""

    layers: range
    keep: int | None = None


@dataclass(frozen=True)
class FirstPass:
    """A pass that only chooses: the `keep` tokens that `layer` scores best are what the model then reads anew.

    They are read as a prompt of their own, at positions 0 … keep - 1.
    """

    layer: int
    keep: int


@dataclass(frozen=True)
class Probe:
    """How the model is made to repeat a prompt after its prefill, so that all of it is scored (engine/probe.py).

    chunk: tokens that are repeated at a time, at most. sinks: the prompt's first tokens, to which every chunk attends
    besides itself. first, later: the texts that ask for the first chunk, and for each later one, whose beginning they
    name by the tokens before it.
    """

    chunk: int
    sinks: int
    first: str
    later: str


@dataclass(frozen=True)
class Drafted:
    """Tokens that a look-ahead drafted after the new ones, as a layer saw them.

    q: [B, Hq, m, D] and k: [B, Hkv, m, D], rotated. live: bool [B, m], False from a sequence's end-of-text token on.
    """

    q: Tensor
    k: Tensor
    live: Tensor

    def attention(self, k: Tensor) -> Tensor:
        """Of their queries to the tokens before them, k [B, Hkv, T, D]: float32 [B, Hkv, G, m, T] (cache/scores.py)."""
        from fastkv.cache.scores import drafted_attention

        return drafted_attention(self.q, k, self.k, self.live)


class Rotary(Protocol):
    """The rotary embedding of a layer (arXiv 2104.09864), and what it did to queries and keys."""

    def undone(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, H, n, D] as it was before it was turned, at positions int64 [B, H or 1, n]: float32."""

    def mean(self, first: int, count: int) -> Tensor:
        """The mean of the rotations of the positions first … first + count - 1: float32 [D, D], for column vectors."""


class Heads(Protocol):
    """The KV heads of a layer, of which this process has some, and other ranks the others (kernels/ranks.py)."""

    def join(self, x: Tensor, dim: int) -> Tensor:
        """What all ranks have of a tensor, one after the other along `dim`."""

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what `join` gave."""


@dataclass(frozen=True)
class ScoreSizes:
    """What `Policy.score` is to be given: B, Hq, Hkv, D, and n_past + T of which it sees the last n queries."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_entries: int
    device: torch.device


@dataclass(frozen=True)
class Observation:
    """What a policy sees of a layer's prefill.

    k and v: [B, Hkv, n_past + T, D]: the entries that the cache of each head kept earlier, at ascending positions, then
    the T new tokens that the layer saw, in their order. q: [B, Hq, n, D] of the last n of the new tokens: n is at least
    the policy's `n_queries`, or T if there are fewer; it is T if the policy needs them all. q and k are rotated.
    n_past: entries kept earlier, before the new tokens in k and v; above 0 only where a sequence continues from a
    cache, and the policy `compresses_again`.
    drafted: what a look-ahead drafted, when the layer is scored for the second time (Policy.lookahead).
    probed: float32 [B, Hkv, T], the most that any query attends to each token while the model repeats the prompt, of a
    policy that has a `probe`.
    positions: int64 [B, Hkv, n_past + T], where they stand in the sequence. rotary: what has turned q and k.
    peaks: float32 [B, Hkv, n_past + T], the most that any of the window's queries, in any query head that reads it,
    attends to each entry; None until the policy has asked for `attention`.
    heads: of a model that several ranks share, whose layers each see a part of the heads; None: these are all.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    n_past: int = 0
    drafted: Drafted | None = None
    probed: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    # What the engine answers `output_norms` with; a policy asks for that.
    output: Callable[[Tensor, str], Tensor] | None = field(default=None, repr=False, compare=False)
    positions: Tensor | None = field(default=None, repr=False, compare=False)
    rotary: Rotary | None = field(default=None, repr=False, compare=False)
    heads: Heads | None = field(default=None, repr=False, compare=False)

    def all_heads(self, x: Tensor) -> Tensor:
        """x [B, H, …] of the KV heads that are seen here -> of all of the layer, those of other ranks among them."""
        return x if self.heads is None else self.heads.join(x, 1)

    def own_heads(self, x: Tensor) -> Tensor:
        """x [B, H, …] of all heads of the layer -> of those that are seen here."""
        return x if self.heads is None else self.heads.own(x, 1)

    def highest(self, x: Tensor) -> Tensor:
        """The highest value of x [B, H, …] in all heads of the layer: a tensor of one value, without dimensions."""
        highest = x.amax()
        return highest if self.heads is None else self.all_heads(highest.view(1, 1)).amax()

    @property
    def peaks(self) -> Tensor | None:
        return self.noted.get("peaks")

    def attention(self, window: int) -> Tensor:
        """Attention of the last `window` queries: float32 [B, Hkv, G, W, n_past + T] (cache/scores.py)."""
        from fastkv.cache.scores import window_attention

        attention = window_attention(self.q, self.k, window)
        self.noted["peaks"] = attention.amax(dim=(2, 3))
        return attention

    def unrotated_keys(self, start: int, end: int) -> Tensor:
        """The entries start … end - 1 of k before their rotation: float32 [B, Hkv, end - start, D].

        Raises FastKVError of an observation that was made without `positions` and `rotary`.
        """
        rotary, positions = self._turning
        stand = positions if self.n_past else positions[:, :1]  # new tokens stand alike in all heads
        return rotary.undone(self.k[:, :, start:end], stand[..., start:end])

    def unrotated_queries(self, start: int, end: int) -> Tensor:
        """The queries start … end - 1 of q before their rotation: float32 [B, Hq, end - start, D].

        Raises FastKVError of an observation that was made without `positions` and `rotary`.
        """
        rotary, positions = self._turning
        stand = positions[:, :1, -self.q.shape[2] :]
        return rotary.undone(self.q[:, :, start:end], stand[..., start:end])

    def mean_rotation(self, count: int) -> Tensor:
        """The mean rotation of the `count` positions after the last token: float32 [D, D], for column vectors.

        Raises FastKVError of an observation that was made without `positions` and `rotary`.
        """
        rotary, positions = self._turning
        return rotary.mean(int(positions[0, 0, -1]) + 1, count)

    @property
    def _turning(self) -> tuple[Rotary, Tensor]:
        if self.rotary is None or self.positions is None:
            raise FastKVError("this observation has no rotation: give Observation its `positions` and `rotary`")
        return self.rotary, self.positions

    def output_norms(self, x: Tensor, norm: str) -> Tensor:
        """How much values change the hidden states through the layer's output projection, W_h for query head h.

        x: [B, Hkv, n, D], which the G query heads of a KV head share, or [B, Hkv, G, n, D]. Returns float32
        [B, Hkv, G, n]: the length of W_h x, by the norm "l1" (as much work as the projection itself) or "l2" (little:
        see engine/output_norms.py). Raises FastKVError of an observation that was made without `output`.
        """
        if self.output is None:
            raise FastKVError("this observation has no output projection: give Observation its `output`")
        return self.output(x if x.dim() == 5 else x.unsqueeze(2), norm)


class OnlineSelector(Protocol):
    """Follows the layers of one prefill, and decides after which of them tokens are dropped."""

    def __call__(self, layer: int, scores: Tensor) -> Tensor | None:
        """scores: float32 [B, Hkv, T - window] of `layer`, which all T (new) tokens have reached.

        None propagates all of them. Else importance scores, float32 [B, H, T - window] for some H, by whose sum over H
        the first stage's `keep` tokens are chosen; then nothing more is asked. At that stage's last layer the answer
        must not be None.
        """


_PACKAGE = __name__.partition(".")[0]


class Policy:
    """Base of every method. This one keeps everything; a method overrides what it decides otherwise.

    A policy is a value: a `@dataclass(frozen=True, kw_only=True)` whose fields are its settings. Those that are
    declared by `fastkv.cache.setting.setting` are checked here; what relates several of them, the class checks in its
    own `__post_init__`, after `super().__post_init__()`.
    """

    name: ClassVar[str]  # as --policy takes it; unless stated, the class's own name in lower case
    window: int = 0  # the last tokens, which are kept whatever the scores say
    # Tokens that a prefill drafts, to score what its layers saw again, before it drops the rest and forgets the draft
    # (engine/lookahead.py). Only for a policy whose `score` looks at Observation.drafted.
    lookahead: int = 0
    needs_all_queries: ClassVar[bool] = False  # of a layer, for its scores; not those of the window alone
    # When a sequence continues from a cache that already holds entries: whether this policy chooses anew among those
    # entries and the new tokens (its budget counting from the whole sequence so far). Else, and where it is `per_head`,
    # the earlier entries stay and the new tokens are kept whole.
    compresses_again: ClassVar[bool] = False
    # How a layer of the cache stores what is kept (None: the plain layout, or that for heads of different lengths).
    layout: ClassVar[type[KVLayer] | None] = None
    # Whether it chooses alike where a layer's heads are shared out over ranks: whatever it works out of several heads,
    # it works out of Observation.all_heads. So do all classes of this package; any other has to say so itself.
    splits_heads: ClassVar[bool] = True
    # Whether a prompt may go by host memory (engine/offloading): whether all that this policy asks of an observation is
    # q, k, v and positions, which are on the host then, where `score` and the others run. Each class says it for
    # itself: one that is derived may look at more.
    scores_on_host: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        if "splits_heads" not in vars(cls):
            cls.splits_heads = cls.__module__.partition(".")[0] == _PACKAGE
        if "scores_on_host" not in vars(cls):
            cls.scores_on_host = False

    def __post_init__(self) -> None:
        """Check the settings, each by itself. Raises FastKVError for a value out of range."""
        check_settings(self)

    @property
    def probe(self) -> Probe | None:
        """What the model repeats before the layers are scored, by Observation.probed; None: nothing.

        Only for a policy that is `over_layers`. It takes positions after the prompt, which are free again afterwards.
        """
        return None

    @property
    def per_head(self) -> bool:
        """Whether the KV heads of a layer keep different numbers of entries (`head_budgets`)."""
        return False

    @property
    def over_layers(self) -> bool:
        """Whether the layers compete for the budgets of the whole model (`model_budgets`).

        Nothing is dropped before the last layer has been scored, so K and V of all tokens stay in memory until then.
        Only for a policy that is `per_head`, without context reduction, and with one `budget` for all layers.
        """
        return False

    @property
    def n_queries(self) -> int:
        """How many of the last queries of a layer the policy looks at, unless it `needs_all_queries`."""
        return self.window

    def validate(self, n_layers: int, n_kv_heads: int | None = None) -> None:
        """Raise FastKVError if a setting does not fit a model of `n_layers` and `n_kv_heads` (None: not checked)."""

    def settings(self, n_layers: int) -> dict[str, Any]:
        """The settings by name, with defaults that depend on the model worked out."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {one.name: getattr(self, one.name) for one in fields}

    def stages(self, n_layers: int, n_tokens: int) -> list[Stage]:
        """Context reduction: the stages, in order, whose ranges together are all layers.

        With an `online_selector`, two stages that meet where tokens are dropped at the latest.
        """
        return [Stage(range(n_layers))]

    def online_selector(self, n_layers: int, n_tokens: int) -> OnlineSelector | None:
        """What decides during a prefill where tokens are dropped; None: `stages` has said it."""
        return None

    def first_pass(self, n_layers: int, n_tokens: int) -> FirstPass | None:
        """Context reduction before the actual prefill, whose `stages` then count from what is left; None: none."""
        return None

    def budget(self, layer: int, n_layers: int, n_tokens: int) -> int:
        """KV compression: entries per KV head that `layer` keeps of a prompt of `n_tokens`, its window included.

        Where the policy is `per_head`, the mean over the heads.
        """
        return n_tokens

    def least(self, layer: int, n_layers: int, n_tokens: int) -> int:
        """The fewest entries per KV head that `layer` keeps of a prompt of `n_tokens`, its window included.

        The `budget` itself, unless it is the scores that say how many a layer keeps: then the budget is the most, for
        which there is memory, and `counts` says.
        """
        return self.budget(layer, n_layers, n_tokens)

    def counts(self, observed: Observation, n_layers: int, scores: Tensor, least: int, most: int) -> Tensor | int:
        """How many entries a layer keeps, its window included, from `least` to `most`; the mean if heads compete.

        One number, of all sequences that are prefilled as one tensor; or int64 [B, Hkv], of a policy that is
        `per_head`. scores: its own, [B, Hkv, n_past + T - window]. Asked of a layer whose `least` is not its `budget`.
        """
        raise NotImplementedError(f"{type(self).__name__} knows its budgets before it scores")

    def head_budgets(self, layer: int, n_layers: int, count: int, scores: Tensor) -> Tensor:
        """int64 [B, Hkv]: entries that each KV head keeps, its window included; together Hkv * count. Of all heads.

        count: the layer's budget, less than the T tokens that it saw. scores: its own, [B, Hkv, T - window]. Asked only
        of a policy that is `per_head`.
        """
        raise NotImplementedError(f"{type(self).__name__} gives every head the same")

    def model_budgets(self, counts: Sequence[int], scores: Sequence[Tensor]) -> list[Tensor]:
        """As `head_budgets`, for all layers at once: int64 [B, Hkv] for each, together Hkv times the sum of `counts`.

        Asked only of a policy that is `over_layers`, once all layers have been scored.
        """
        raise NotImplementedError(f"{type(self).__name__} gives every layer its own budget")

    def ranking(self, observed: Observation, scores: Tensor, counts: Tensor | int) -> Tensor:
        """What chooses the entries once their number is known: like `scores`, or `scores` itself.

        counts: entries that each KV head keeps, its window included; int64 [B, Hkv] of a policy that is `per_head`.
        Asked of a layer that drops entries.
        """
        return scores

    def covering(self, tail: int, n_tokens: int) -> Policy:
        """The policy for a prompt of `n_tokens` whose last `tail` are the chat template's, and say nothing.

        What looks at the last tokens of a prompt is to see the end of the user's question, too.
        """
        return self

    def importance(self, observed: Observation, scores: Tensor, count: int | None) -> Tensor:
        """What chooses the new tokens that are propagated, by its sum over H: [B, H, T - window] for some H.

        It is of all heads of the layer (Observation.all_heads). scores: those that chose the entries, [B, Hkv, n_past +
        T - window]. count: how many tokens are propagated, the window included; None where an `online_selector` says it
        later.
        """
        return observed.all_heads(scores[..., observed.n_past :])

    def score(self, observed: Observation) -> Tensor:
        """float32 [B, Hkv, n_past + T - window]: how much each token before the window matters to each KV head.

        Asked of a layer that drops entries or tokens. Must not change what is observed.
        """
        raise NotImplementedError(f"{type(self).__name__} drops tokens, so it must score them")

    def scratch(self, sizes: ScoreSizes) -> int | None:
        """Float32 values that `score` holds at its worst moment, to be told before a request is accepted.

        None: what the attention of the queries that it looks at takes.
        """
        return None

    # --- decode steps that read few of the entries (cache/reader.py) ---

    def reads_few(self, layer: int, n_entries: int, n_tokens: int) -> bool:
        """Whether a step may read fewer than all entries of a layer, `n_entries` of each head and `n_tokens` so far."""
        return False

    def read_budget(self, n_tokens: int) -> int:
        """Entries that a step reads of each KV head, where the sequence has so many tokens with the step's own."""
        return n_tokens

    def index(self, layer: int, sizes: IndexSizes, device: torch.device) -> Index:
        """What chooses the entries that a step reads of a layer. Asked only where the policy `reads_few`."""
        raise NotImplementedError(f"{type(self).__name__} reads everything")

    def index_bytes(self, layer: int, sizes: IndexSizes) -> tuple[int, int]:
        """Of that index: bytes that it holds, and that it takes besides while it learns."""
        raise NotImplementedError(f"{type(self).__name__} reads everything")

    def keeping_all(self) -> Policy | None:
        """What keeps all tokens that come after those of this policy, and reads in a step what this one does.

        None: FullKV, which reads everything.
        """
        return None


@dataclass(frozen=True)
class LayerPlan:
    """How many tokens a layer sees in the prefill, keeps in its cache, and propagates (None: all it saw).

    Under a policy with an `online_selector` these are upper bounds: tokens may be dropped at an earlier layer.
    least: the fewest that it keeps, where its scores say how many (Policy.counts); as it stands, `kept`.
    """

    seen: int
    kept: int
    propagated: int | None
    least: int = -1

    def __post_init__(self) -> None:
        if self.least < 0:
            object.__setattr__(self, "least", self.kept)  # the class is frozen


def plan_layers(policy: Policy, n_layers: int, n_tokens: int) -> list[LayerPlan]:
    """What `policy` will do with a prompt of `n_tokens`, layer by layer: the sizes, before anything is computed."""
    plans: list[LayerPlan] = []
    first = policy.first_pass(n_layers, n_tokens)
    seen = n_tokens if first is None else first.keep
    for stage in policy.stages(n_layers, seen):
        reduces = stage.keep is not None and stage.keep < seen
        for layer in stage.layers:
            kept = min(policy.budget(layer, n_layers, n_tokens), seen)
            if kept < min(policy.window, seen):
                raise FastKVError(
                    f"policy {policy.name}: budget must be at least its window ({policy.window}), not {kept} (layer "
                    f"{layer}, {n_tokens} tokens)"
                )
            if policy.over_layers and (reduces or (plans and (seen, kept) != (plans[0].seen, plans[0].kept))):
                raise FastKVError(
                    f"policy {policy.name}: layers that compete must all see the same tokens, and have the same budget "
                    f"(layer {layer}, {n_tokens} tokens)"
                )
            propagated = stage.keep if reduces and layer == stage.layers[-1] else None
            plans.append(LayerPlan(seen, kept, propagated, min(policy.least(layer, n_layers, n_tokens), kept)))
        if reduces and stage.keep is not None:
            seen = stage.keep
    return plans


def drops_tokens(policy: Policy, n_layers: int, n_tokens: int) -> bool:
    """Whether any layer may forget any token of a prompt of `n_tokens`.

    A plan's numbers are upper bounds where the policy decides online, so a layer that reduces at all counts.
    """
    plans = plan_layers(policy, n_layers, n_tokens)
    return any(plan.least < n_tokens or plan.propagated is not None for plan in plans)
