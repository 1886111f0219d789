"""How many tokens to draft at a time: what pays, by the times and the acceptance of the answer so far.

With an acceptance of a for each token, n drafted ones bring E(n) = 1 + a + ... + a^n tokens, for n drafts and one
verification of n + 1 tokens; a plain step brings one. The best n is the one with the most tokens per second
(arXiv 2211.17192, section 3.3); where none gains enough over plain steps, nothing is drafted for a while.
"""

from __future__ import annotations

import math

from fastkv.engine.speculation.figures import MOST_DRAFTED
from fastkv.models.llama import JUDGED

_PLAIN_FIRST = 2  # plain steps before anything is drafted: what a step takes here
_FIRST = JUDGED - 1  # drafted tokens of the first round: judging fewer takes as long, where products of few rows do
_GAIN = 1.05  # what drafting is to bring at least; times are not exact
_PAUSE, _LONGEST_PAUSE = 16, 4096  # plain steps before drafting is tried again, doubled each time that it does not pay
_LOSS = 0.03  # of the time of plain steps, which such a try may cost
_FADING = 0.9  # of what was seen, after every round
_SLOWER = 1.1  # times what was known is the most that is believed at once


def expected_tokens(acceptance: float, drafted: int) -> float:
    """E(n): tokens that a verification of n drafted ones brings on average, for an acceptance in [0, 1]."""
    return math.fsum(acceptance**place for place in range(drafted + 1))


class Pace:
    """Says before every round how many tokens to draft, 0 for a plain step, and is told what came of it.

    fixed: always so many, which leaves no choice to a clock (None: as many as pay, at most `most`). Times in seconds.
    """

    def __init__(self, fixed: int | None = None, most: int = MOST_DRAFTED // 2) -> None:
        self._fixed, self._most = fixed, most
        self._plain: float | None = None
        self._draft: float | None = None
        self._verified: dict[int, float] = {}  # tokens of a verification -> time
        self._accepted, self._refused = 2.0, 1.0  # as if so many had been seen
        self._pause, self._left = _PAUSE, _PLAIN_FIRST

    @property
    def plain_step(self) -> float | None:
        """What a plain step takes, the least of those that there were."""
        return self._plain

    @property
    def acceptance(self) -> float:
        """The chance of a drafted token to stay, as far as it was seen lately."""
        return self._accepted / (self._accepted + self._refused)

    def next(self) -> int:
        """Tokens to draft now."""
        if self._fixed is not None:
            return self._fixed
        if self._left > 0:
            return 0
        return self._best()[0] if self._verified else _FIRST

    def stepped(self, seconds: float) -> None:
        """A plain step took so long."""
        self._plain = seconds if self._plain is None else min(seconds, self._plain)
        self._left -= 1

    def judged(self, drafted: int, accepted: int, drafting: float, verifying: float) -> None:
        """Of `drafted` tokens so many were accepted; how long drafting all of them, and judging them, took."""
        self._accepted = _FADING * self._accepted + accepted
        self._refused = _FADING * self._refused + (accepted < drafted)
        self._draft = _noted(self._draft, drafting / drafted)
        self._verified[drafted + 1] = _noted(self._verified.get(drafted + 1), verifying)
        if self._fixed is not None:
            return
        if self._best()[1] < _GAIN:
            lost = (drafting + verifying) / (self._plain or verifying) - 1 - accepted
            self._left = min(max(self._pause, math.ceil(lost / _LOSS)), _LONGEST_PAUSE)
            self._pause = 2 * self._pause
        else:
            self._pause = _PAUSE

    def _best(self) -> tuple[int, float]:
        """How many drafted tokens pay most, and how many times as fast as plain steps that is."""
        return max(((count, self.gain(count)) for count in range(1, self._most + 1)), key=lambda pair: pair[1])

    def gain(self, drafted: int) -> float:
        """How many times as fast as plain steps rounds of so many drafted tokens are expected to be."""
        assert self._plain is not None, "plain steps come first"
        assert self._draft is not None, "and a round"
        seconds = drafted * self._draft + self._verifying(drafted + 1)
        return expected_tokens(self.acceptance, drafted) * self._plain / seconds

    def _verifying(self, count: int) -> float:
        """What a verification of so many tokens takes: as measured, or by the nearest that was."""
        assert self._plain is not None
        if count in self._verified:
            return self._verified[count]
        nearest = min(self._verified, key=lambda known: abs(known - count))
        slope = max(0.0, self._verified[nearest] - self._plain) / (nearest - 1)
        return max(self._plain, self._verified[nearest] + slope * (count - nearest))


def _noted(known: float | None, now: float) -> float:
    """The least that was seen, as what comes once (kernels are chosen) is no measure; longer times count by and by."""
    return now if known is None else min(now, _SLOWER * known)
