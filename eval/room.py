"""How long a prompt may be, so that every policy of a run reads all of it and has room for the answer."""

from __future__ import annotations

from collections.abc import Sequence

from fastkv.cache.policy import Policy, drops_tokens
from fastkv.engine.plan import position_limit
from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig


def longest_prompt(config: ModelConfig, policies: Sequence[Policy], answer: int) -> int:
    """Tokens of the longest prompt with an answer of `answer` tokens. Raises FastKVError where there is no room."""
    limit, window = config.context_length, config.sliding_window
    if window is not None and any(drops_tokens(policy, config.n_layers, limit) for policy in policies):
        limit = min(limit, window)
    if answer >= limit:
        raise FastKVError(
            f"an answer of {answer} tokens leaves no room for a prompt in the {limit} that the model reads",
            setting="max_tokens",
        )
    return limit - answer


def check_room(config: ModelConfig, policy: Policy, length: int, answer: int, task: str, setting: str) -> None:
    """FastKVError, naming `setting`, unless a prompt of `length` tokens and its answer fit under this policy."""
    try:
        limit = position_limit(config, policy, length)
    except FastKVError as error:
        raise FastKVError(str(error), setting=setting) from None
    if answer >= limit:
        raise FastKVError(
            f"an answer of {answer} tokens leaves no room for a prompt in the {limit} that the model reads",
            setting="max_tokens",
        )
    if length + answer > limit:
        raise FastKVError(
            f"{length} tokens and an answer of {answer} for task {task} are more than the {limit} that the model reads "
            f"under policy {policy.name}; ask for at most {limit - answer}",
            setting=setting,
        )
