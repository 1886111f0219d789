"""What methods share that score a prompt by what its last tokens attend to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastkv.cache.policies.compressed import MAX_KERNEL, WINDOW_HELP, odd_width
from fastkv.cache.policies.scored import Scored
from fastkv.cache.policy import Observation, Policy
from fastkv.cache.setting import choice, number, setting, switch, whole

if TYPE_CHECKING:
    from torch import Tensor

QUERIES_HELP = "sum or max of what these queries attend"
POOLING_HELP = "max or avg of --kernel neighbours; forward: a score also lifts the --reach tokens after it"
REACH_HELP = "tokens after its own that a score lifts, with --pooling forward"
VALUES_HELP = "weigh attention by the length of the value that it reads"
SINKS_HELP = "first tokens, always kept, whose attention lifts no others"
SHARE_HELP = "how much of the layer's best score of a token each KV head adds to its own"
LOOKAHEAD_HELP = "tokens that are drafted, and then forgotten, to score the prompt by their queries; 0: none"
AHEAD_REACH_HELP = "--reach of the scores by drafted tokens"


@dataclass(frozen=True, kw_only=True)
class WindowScored(Scored):
    """Compressed by what the last tokens attend to (arXiv 2404.14469).

    window: the last tokens (the observation window), always kept, whose queries score the others. In a chat, those of
    the template's end come on top (`covering`). queries: "sum" or "max" of what these queries attend.
    pooling: smoothing of the scores: "max" or "avg" of `kernel` neighbours, or "forward": a score also lifts the
    `reach` tokens after it (cache/scores.py tells why). values: weigh attention by the length of the value that it
    reads. sinks: the first tokens, always kept; the attention that they draw lifts no token after them. share: how much
    of the best score that a token has in any KV head of the layer each head adds to its own.

    lookahead: tokens that are drafted greedily before anything is dropped for good, whose queries then score the
    prompt in place of the window's, pooled with `lookahead_reach` in place of `reach` (None: with the same; a draft
    that has only repeated the question points to where the answer begins, as the window does); each layer chooses
    anew by that, and the draft is forgotten (after arXiv 2505.20334; engine/lookahead.py). The propagated tokens stay
    as they were chosen. An end-of-text token ends the draft, and so does the model's last position. It works where a
    sequence continues from a cache, too, if the policy chooses anew there (`compresses_again`). Until the draft
    ends, the K and V of all tokens that each layer saw stay in memory, two times n_kv_heads * head_dim values for
    each token and layer; a prompt for which there is no such room is refused. 0 (default) drafts nothing and holds
    nothing.
    """

    window: int = setting(8, whole(1), WINDOW_HELP, metavar="W")
    queries: str = setting("sum", choice("sum", "max"), QUERIES_HELP, metavar="sum|max")
    pooling: str = setting("max", choice("max", "avg", "forward"), POOLING_HELP, metavar="max|avg|forward")
    kernel: int = setting(7, odd_width(), "width of the pooling max or avg, odd", metavar="K")
    reach: int = setting(20, whole(0, MAX_KERNEL), REACH_HELP, metavar="N")
    values: bool = setting(False, switch(), VALUES_HELP, metavar="yes|no")
    sinks: int = setting(0, whole(0), SINKS_HELP, metavar="N")
    share: float = setting(0.0, number(0), SHARE_HELP, metavar="R")
    lookahead: int = setting(0, whole(0), LOOKAHEAD_HELP, metavar="N")
    lookahead_reach: int | None = setting(None, whole(0, MAX_KERNEL), AHEAD_REACH_HELP, metavar="N", unset="the same")

    def least_budget(self, n_tokens: int) -> int:
        """The fewest tokens of a prompt that the policy keeps or propagates anywhere, as far as its settings say."""
        return self.fewest(n_tokens)

    def covering(self, tail: int, n_tokens: int) -> Policy:
        """The window covers the chat template's end, too, where that leaves half of every budget to other tokens."""
        room = self.least_budget(n_tokens) // 2
        window = max(self.window, min(self.window + tail, room))
        return self if window == self.window else dataclasses.replace(self, window=window)

    def score(self, observed: Observation) -> Tensor:
        ahead_reach = self.reach if self.lookahead_reach is None else self.lookahead_reach
        return self.scores(observed, self.reach, ahead_reach)

    def scores(self, observed: Observation, reach: int | None, ahead_reach: int | None) -> Tensor:
        """Scores of the KV heads, [B, Hkv, n], with these in place of the settings `reach` and `lookahead_reach`.

        None: each head's own, nothing shared, pooled over `kernel` neighbours, whatever `pooling` is.
        """
        scores, drafted = self.smoothed(observed, self.received(observed), reach), observed.drafted
        if drafted is None:
            return scores
        received = self._received(observed, drafted.attention(observed.k), self.window)
        ahead = self.smoothed(observed, received, ahead_reach)
        return ahead.where(drafted.live[:, :1, None], scores)  # of a sequence that has drafted nothing the window's

    def received(self, observed: Observation) -> Tensor:
        """What each query head's window attends to before it: float32 [B, Hkv, G, n_past + T - window]."""
        return self._received(observed, observed.attention(self.window), self.window)

    def mass(self, observed: Observation, scores: Tensor) -> Tensor:
        """The attention of the window, or of what a look-ahead drafted: summed over queries and group, not pooled.

        A query's attention sums to one (a drafted one's to less), and what the window attends to in itself counts. So
        of the output of a query that loses the share d of its attention at most 2 d max |v| changes.
        """
        attention, drafted = observed.attention(self.window).sum(dim=(2, 3)), observed.drafted
        if drafted is None:
            return attention
        ahead = drafted.attention(observed.k).sum(dim=(2, 3))
        return ahead.where(drafted.live[:, :1, None], attention)

    def _received(self, observed: Observation, attention: Tensor, window: int) -> Tensor:
        """The same of the attention of some queries, [B, Hkv, G, n, n_past + T], to what stands before a window."""
        from fastkv.cache.scores import over_queries, value_norms

        received = over_queries(attention, self.queries)[..., :-window]
        if self.values:
            received = received * value_norms(observed.v[:, :, :-window]).unsqueeze(2)
        return received

    def smoothed(self, observed: Observation, received: Tensor, reach: int | None) -> Tensor:
        """Scores of the KV heads, [B, Hkv, n], from those of their query heads, [B, Hkv, G, n]: pooled and summed."""
        return self.raised(observed, self.pooled(received, reach).sum(dim=2), shared=reach is not None)

    def pooled(self, received: Tensor, reach: int | None) -> Tensor:
        """What tokens receive, [..., n], pooled along them; what the sinks draw is left out.

        reach: of forward pooling. None: the maximum of `kernel` neighbours in its place.
        """
        from fastkv.cache.scores import forward_pooled, pooled

        if self.sinks:
            received = received.clone()
            received[..., : self.sinks] = 0
        if self.pooling == "forward" and reach is not None:
            return forward_pooled(received, reach)
        return pooled(received, self.kernel, "avg" if self.pooling == "avg" else "max")

    def raised(self, observed: Observation, scores: Tensor, *, shared: bool = True) -> Tensor:
        """Scores of the KV heads, [B, Hkv, n], with what they share, and the sinks above all others."""
        if shared and self.share:
            scores = scores + self.share * observed.all_heads(scores).amax(dim=1, keepdim=True)
        if self.sinks:
            scores[..., : self.sinks] = observed.highest(scores) + 1
        return scores
