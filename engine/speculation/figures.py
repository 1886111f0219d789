"""What speculation is asked for, and what came of it. Imports no torch: the command checks its flags before that."""

from __future__ import annotations

from dataclasses import dataclass

from fastkv.errors import check_choice, check_integer

KINDS = ("self", "ngram")
DRAFT_WEIGHTS = ("int8", "int4")
MOST_DRAFTED = 16  # tokens at a time: a cache can always forget so many, and more are seldom all right


@dataclass(frozen=True)
class Speculation:
    """How the tokens after the next one are guessed.

    kind: "self", by the same model over the entries that the policy keeps, while the full cache decides; "ngram", from
    what followed the last tokens earlier in the text. draft_tokens: guessed at a time (None: as many as pay, which is
    measured while the answer grows). Raises FastKVError for another kind or number.
    """

    kind: str
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        check_choice("speculation", self.kind, KINDS)
        if self.draft_tokens is not None:
            check_integer("draft_tokens", self.draft_tokens, 1, MOST_DRAFTED)


@dataclass(frozen=True)
class Speculated:
    """What speculation brought to one answer.

    verifications: steps that judged drafted tokens; plain_steps: those without any. drafted_tokens and accepted_tokens:
    of all verifications. speed_up: the time that plain steps would have taken for the same tokens, over the time that
    was taken; from the plain steps of this very answer, None where there was none. draft_kv_bytes: the slots of the
    draft's entries, which come on top of the full cache's; draft_weight_bytes: its weights, where they are others. Both
    0 for "ngram". draft_seconds, verify_seconds: of all drafts, and of all verifications; plain_seconds: of a plain
    step, the least that there was, None without one.
    """

    kind: str
    verifications: int
    plain_steps: int
    drafted_tokens: int
    accepted_tokens: int
    speed_up: float | None
    draft_kv_bytes: int
    draft_weight_bytes: int
    draft_seconds: float
    verify_seconds: float
    plain_seconds: float | None

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that stayed, in [0, 1]; None where none was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens that a verification brought: those that it accepted, and one of its own. None where there was none."""
        if not self.verifications:
            return None
        return 1 + self.accepted_tokens / self.verifications
