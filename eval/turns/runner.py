"""The run: each text once for each policy, policies in turn; what it is asked, and how a conversation goes on.

turns: one growing conversation, into which the right answer goes after every question, whatever the model said, as is
SCBench's default (arXiv 2412.10319). requests: every question finds the text alone in the cache, as it was left there.
The first question finds the same in both.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import product

from fastkv.cache.policy import Policy
from fastkv.engine.llm import LLM
from fastkv.engine.output import Output
from fastkv.engine.plan import position_limit
from fastkv.errors import FastKVError
from fastkv.eval.conversation import Conversation
from fastkv.eval.example import Draw, Example, Slot
from fastkv.eval.policy_spec import PolicySpec, check_stored, stored_as
from fastkv.eval.results import MEASURED, Record, Results
from fastkv.eval.runner import Prompts, Report
from fastkv.eval.turns.talk import Family, Talk

TURNS, REQUESTS = "turns", "requests"


@dataclass(frozen=True)
class Plan:
    """Which texts a run has: `examples` of each family and length, with `questions` each. max_tokens: of the answers;
    None leaves it to the family.
    """

    families: tuple[Family, ...]
    lengths: tuple[int, ...]
    examples: int
    questions: int
    mode: str = TURNS
    seed: int = 0
    max_tokens: int | None = None

    def slots(self) -> list[Slot]:
        """Every text, first those with index 0 of all families and lengths."""
        return [
            Slot(family.name, length, None, index)
            for index in range(self.examples)
            for family in self.families
            for length in self.lengths
        ]

    def family(self, name: str) -> Family:
        return next(family for family in self.families if family.name == name)


@dataclass(frozen=True)
class Encoded:
    """A talk as every policy is given it: the ids of its text, and of each turn those of question, and right answer.

    Every part is encoded on its own, so that it is the same whatever stands before it. max_tokens: of each answer.
    """

    slot: Slot
    talk: Talk
    context: list[int]
    questions: list[list[int]]
    golden: list[list[int]]
    max_tokens: list[int]

    def before(self, turn: int, mode: str) -> list[int]:
        """The ids that stand before the answer of a turn."""
        earlier = range(turn) if mode == TURNS else ()
        told = [token for k in earlier for token in self.questions[k] + self.golden[k]]
        return self.context + told + self.questions[turn]

    def room(self, mode: str) -> int:
        """Tokens that come after the context at most."""
        turns = range(len(self.questions))
        return max(len(self.before(k, mode)) + self.max_tokens[k] for k in turns) - len(self.context)

    def checksum(self, turn: int, mode: str) -> str:
        """The beginning of the SHA-256 of the ids before an answer."""
        return hashlib.sha256(array("q", self.before(turn, mode)).tobytes()).hexdigest()[:16]


class TurnsRunner:
    """Runs a plan on a model. Everything that can be wrong with the first text of each kind is found here.

    Raises FastKVError where a text and what comes after it do not fit the model under one of the policies, and where
    the model has no tokenizer.
    """

    def __init__(self, llm: LLM, plan: Plan, specs: list[PolicySpec]) -> None:
        if any(spec.share_layers is not None for spec in specs):
            raise FastKVError("share_layers does not go with several questions about one text: leave it out")
        self._llm, self._plan, self._specs = llm, plan, specs
        self._prompts = Prompts(llm)
        for family in plan.families:
            for length in plan.lengths:
                self.encoded(Slot(family.name, length, None, 0))
        for length, spec in product(plan.lengths, specs):
            check_stored(llm, spec, length, max_tokens=1)

    def encoded(self, slot: Slot) -> Encoded:
        """Write a text with its questions. Raises FastKVError where it does not fit its length, or the model."""
        plan, prompts = self._plan, self._prompts
        draw = Draw(slot, plan.seed, prompts.count, prompts.bare, prompts.decode)
        talk = plan.family(slot.task).write(draw, plan.questions)
        encoded = Encoded(
            slot,
            talk,
            prompts.ids(Example(talk.prompt, ())),
            [prompts.bare(turn.asked.text) for turn in talk.turns],
            [prompts.bare(turn.golden) for turn in talk.turns],
            [turn.max_new_tokens if plan.max_tokens is None else plan.max_tokens for turn in talk.turns],
        )
        for spec in self._specs:
            self._check_room(encoded, spec.policy)
        return encoded

    def warm_up(self) -> None:
        """An answer that nobody sees: the first one of a process takes longer than it would later on."""
        encoded = self.encoded(self._plan.slots()[0])
        talk = Conversation(self._llm, self._specs[0].policy, encoded.context)
        talk.ask(encoded.questions[0], encoded.max_tokens[0])

    def run(self, results: Results, report: Report = lambda record, done, total: None) -> None:
        """Add the records that `results` lacks, in order. Texts are drawn as they are needed."""
        slots, turns = self._plan.slots(), range(self._plan.questions)
        there = {(record.id, record.policy) for record in results.records}
        texts = {record.id: record.prompt_sha256 for record in results.records}
        done, total = len(results.records), len(slots) * len(self._specs) * len(turns)
        for number, slot in enumerate(slots):
            first = number % len(self._specs)  # each time another one, as in Runner
            in_turn = self._specs[first:] + self._specs[:first]
            lacking = [[k for k in turns if (turn_id(slot, k), spec.label) not in there] for spec in in_turn]
            if not any(lacking):
                continue
            encoded = self.encoded(slot)
            for k in turns:
                self._check_text(encoded, k, texts.get(turn_id(slot, k)))
            for spec, missing in zip(in_turn, lacking, strict=True):
                for record in self.answers(encoded, spec, missing):
                    results.add(record)
                    done += 1
                    report(record, done, total)

    def answers(self, encoded: Encoded, spec: PolicySpec, turns: Collection[int]) -> Iterator[Record]:
        """Read the text under a policy, and put these of its questions, in their order.

        In a growing conversation those before them are there with their right answers, as if they had been put, too.
        """
        growing = self._plan.mode == TURNS
        with stored_as(self._llm, spec):
            talk = Conversation(self._llm, spec.policy, encoded.context) if turns else None
        for k in range(max(turns, default=-1) + 1):
            assert talk is not None
            begins, question = talk.position, encoded.questions[k]
            if k in turns:
                output = talk.ask(question, encoded.max_tokens[k])
                yield self._record(encoded, spec, k, output, talk.context_s)
                talk.rewind(begins + len(question) if growing else begins)
            elif growing:
                talk.add(question)
            if growing and k < max(turns):
                talk.add(encoded.golden[k])

    def _record(self, encoded: Encoded, spec: PolicySpec, k: int, output: Output, context_s: float) -> Record:
        slot, turn = encoded.slot, encoded.talk.turns[k]
        return Record(
            id=turn_id(slot, k),
            policy=spec.label,
            prompt_sha256=encoded.checksum(k, self._plan.mode),
            answers=turn.asked.answers,
            prediction=output.text,
            score=turn.score(output.text, turn.asked),
            context_tokens=len(encoded.context),
            context_s=context_s,
            turn=k + 1,
            **asdict(slot),
            **{name: getattr(output.metrics, name) for name in MEASURED},
        )

    def _check_text(self, encoded: Encoded, k: int, known: str | None) -> None:
        if known not in (None, encoded.checksum(k, self._plan.mode)):
            message = f"example {turn_id(encoded.slot, k)} was another text when the run began; name another file"
            raise FastKVError(message, setting="output")

    def _check_room(self, encoded: Encoded, policy: Policy) -> None:
        """FastKVError unless the text and all that comes after it fit under this policy."""
        after, length = encoded.room(self._plan.mode), len(encoded.context)
        try:
            limit = position_limit(self._llm.config, policy, length)
        except FastKVError as error:
            raise FastKVError(str(error), setting="length") from None
        if length + after > limit:
            raise FastKVError(
                f"{length} tokens and {after} for the questions and answers of task {encoded.slot.task} are more than "
                f"the {limit} that the model reads under policy {policy.name}; ask for at most {max(limit - after, 0)}",
                setting="length",
            )


def turn_id(slot: Slot, k: int) -> str:
    """Stable from run to run, and unique within one."""
    return f"{slot.id}/turn={k + 1}"
