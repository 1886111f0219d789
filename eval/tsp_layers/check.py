"""The check of a setting: run it, and see what it costs. Two kinds, by what is known of the prompts.

Questions with answers are scored as in every other run of fastkv-eval. A user's own prompts have no answers: what the
full cache predicts next is the measure, and the first token at which a setting departs from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import Protocol

import torch
from torch import Tensor

from fastkv.cache.policies import FullKV
from fastkv.cache.policy import Policy
from fastkv.engine.llm import LLM
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.runner import Question, Runner
from fastkv.eval.statistics import paired_estimate

Show = Callable[[str, int, int], None]  # what is being done, prompts done, prompts in all


@dataclass
class Result:
    """scores: for each group, one in [0, 1] for each prompt, in order. divergence: KL in nats for each prompt, or none.

    A result that stopped at a group where it was clearly lower lacks the groups after it. Clearly: the whole 95 %
    confidence interval of the difference over the same prompts is on one side of zero.
    """

    scores: dict[str, list[float]] = field(default_factory=dict)
    divergence: list[float] = field(default_factory=list)

    @property
    def all_scores(self) -> list[float]:
        return [one for group in self.scores.values() for one in group]

    @property
    def total(self) -> float:
        return fsum(self.all_scores)

    def clearly_lower_in(self, other: Result) -> str | None:
        """The first group that is, or None."""
        pairs = ((group, paired_estimate(scores, other.scores[group])) for group, scores in self.scores.items())
        return next((group for group, difference in pairs if difference.high < 0), None)

    def clearly_higher(self, other: Result) -> bool:
        """Over all prompts, which both have."""
        return paired_estimate(self.all_scores, other.all_scores).low > 0

    def worse_than(self, other: Result) -> str | None:
        """Why, or None: clearly lower in a group, lower in all, or level below the best score and more divergent."""
        group = self.clearly_lower_in(other)
        if group is not None:
            return f"clearly lower at {group}"
        if self.total < other.total:
            return "lower in all"
        level = self.total == other.total < len(self.all_scores)
        return "a higher KL" if level and fsum(self.divergence) > fsum(other.divergence) else None


class Check(Protocol):
    """Runs a policy on all prompts."""

    def run(self, label: str, policy: Policy, default: Result | None = None) -> Result:
        """With `default`, stop after the first group where `policy` is clearly lower than that."""


class AnswerCheck:
    """Questions, answered greedily and scored by their tasks' own rules. A group is a task at a length."""

    def __init__(self, runner: Runner, questions: Sequence[Question], show: Show) -> None:
        self._runner, self._show, self._total = runner, show, len(questions)
        self._groups: dict[str, list[Question]] = {}
        for question in questions:
            length = question.slot.length
            group = question.slot.task if length is None else f"{question.slot.task}, {length:,} tokens"
            self._groups.setdefault(group, []).append(question)

    def run(self, label: str, policy: Policy, default: Result | None = None) -> Result:
        result, spec = Result(), PolicySpec(label, policy)
        for group, questions in self._groups.items():
            scores = result.scores[group] = []
            for question in questions:
                self._show(label, len(result.all_scores), self._total)
                scores.append(self._runner.answer(question, spec).score)
            if default is not None and result.clearly_lower_in(default):
                break
        return result


class ContinuationCheck:
    """Prompts without answers: the share of the full cache's first `n_tokens` greedy tokens before one differs.

    Its divergence is KL(full cache ‖ policy) of the next token's distribution.
    """

    def __init__(self, llm: LLM, prompts: Sequence[list[int]], n_tokens: int, show: Show) -> None:
        self._llm, self._prompts, self._n_tokens, self._show = llm, prompts, n_tokens, show
        self._references: list[tuple[Tensor, list[int]]] = []

    def run(self, label: str, policy: Policy, default: Result | None = None) -> Result:
        scores: list[float] = []
        result = Result({"greedy tokens": scores})
        for number, ids in enumerate(self._prompts):
            self._show(label, number, len(self._prompts))
            if len(self._references) == number:
                self._references.append(self._continue(ids, FullKV(), None))
            logits, expected = self._references[number]
            # The full cache is what the others are held against: it need not run twice.
            found, tokens = (logits, expected) if isinstance(policy, FullKV) else self._continue(ids, policy, expected)
            scores.append(len(tokens) / len(expected))
            result.divergence.append(divergence(logits, found))
        return result

    def _continue(self, ids: list[int], policy: Policy, expected: list[int] | None) -> tuple[Tensor, list[int]]:
        """Next-token logits [V], and greedy tokens: up to an end of text, or those that agree with `expected`."""
        prefill = self._llm.prefill(ids, policy, max_tokens=self._n_tokens)
        first, logits = prefill.logits[0], prefill.logits
        ends = self._llm.tokenizer.eos_ids if self._llm.tokenizer else frozenset(self._llm.config.eos_token_ids)
        wanted = self._n_tokens if expected is None else len(expected)
        tokens: list[int] = []
        while len(tokens) < wanted:
            token = logits.argmax(dim=-1)
            if expected is not None and int(token) != expected[len(tokens)]:
                break
            tokens.append(int(token))
            if tokens[-1] in ends or len(tokens) == wanted:
                break
            logits = self._llm.decode(prefill.cache, token)
        return first, tokens


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) in nats of two distributions given as logits [V]."""
    log_p, log_q = (logits.double().log_softmax(dim=-1) for logits in (p, q))
    return max(0.0, float(torch.sum(log_p.exp() * (log_p - log_q))))
