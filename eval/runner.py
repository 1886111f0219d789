"""The run: every example once for each policy, policies in turn, so that a run stopped anywhere is balanced."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fastkv.cache.policy import Policy, drops_tokens
from fastkv.engine.llm import LLM
from fastkv.engine.output import Output
from fastkv.engine.plan import position_limit
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError
from fastkv.eval.boundary import question_start
from fastkv.eval.conversation import Conversation
from fastkv.eval.example import Draw, Example, Slot, Task
from fastkv.eval.policy_spec import PolicySpec, check_stored, stored_as
from fastkv.eval.results import MEASURED, Record, Results
from fastkv.models.config import ModelConfig

Report = Callable[[Record, int, int], None]  # the latest record, records there, records in all


@dataclass(frozen=True)
class Plan:
    """Which examples a run has: `examples` for each task and length, and for each depth where a task has depths.

    Tasks whose texts have lengths of their own have their first `longbench_examples`, all if None; prompts of more than
    `longbench_tokens` are cut, None being as many as the model reads. max_tokens: of the answers; None leaves it to the
    task.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    examples: int
    seed: int = 0
    max_tokens: int | None = None
    longbench_examples: int | None = None
    longbench_tokens: int | None = None

    def slots(self) -> list[Slot]:
        """Every example, first those with index 0 of all tasks, lengths and depths."""
        return [
            Slot(task.name, length, depth, index)
            for index in range(max(map(self.count, self.tasks)))
            for task in self.tasks
            if index < self.count(task)
            for length in self.lengths_of(task)
            for depth in (self.depths if task.has_depth else (None,))
        ]

    def count(self, task: Task) -> int:
        """How many examples a task has, for each length and depth."""
        if task.has_length or task.most is None:
            return self.examples
        return task.most if self.longbench_examples is None else min(task.most, self.longbench_examples)

    def lengths_of(self, task: Task) -> tuple[int | None, ...]:
        return self.lengths if task.has_length else (None,)

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def answer_tokens(self, task: Task) -> int:
        return task.max_new_tokens if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True)
class Question:
    """An example as every policy is given it: its place in the run, its text and the token ids of that.

    asked_at: where in `ids` the question begins, if it is to come after the context was read.
    """

    slot: Slot
    example: Example
    ids: list[int]
    asked_at: int | None = None

    @property
    def checksum(self) -> str:
        """The beginning of the SHA-256 of the token ids."""
        return hashlib.sha256(array("q", self.ids).tobytes()).hexdigest()[:16]


class Prompts:
    """The model's own tokenizer, and its chat template where `chat`. Raises FastKVError where it has none.

    lead: whether a prompt ends with the beginning of the answer; else with the question, or the template after it.
    """

    def __init__(self, llm: LLM, chat: bool = False, lead: bool = True) -> None:
        if llm.tokenizer is None:
            raise FastKVError("the model has no tokenizer, and a task is a text", setting="model")
        self._llm, self._tokenizer, self._chat, self._lead = llm, llm.tokenizer, chat, lead
        self.decode = llm.tokenizer.decode
        self._added = len(llm.tokenizer.encode(""))  # BOS, and what else the model's files ask for

    def ids(self, example: Example) -> list[int]:
        """Token ids of the prompt and the beginning of its answer, which a chat template puts into the model's turn."""
        lead = example.lead if self._lead else ""
        if not (self._chat and example.chat):
            return self._tokenizer.encode(example.prompt + lead)
        ids = self._llm.chat([{"role": "user", "content": example.prompt}])
        return ids + self.bare(lead.lstrip()) if lead else ids  # which then knows where the template's end begins

    def count(self, example: Example) -> int:
        return len(self.ids(example))

    def asked_at(self, example: Example, ids: list[int]) -> int | None:
        """Where in these `ids` of an example its question begins; None if there is none, or no context before it."""
        chat = self._chat and example.chat  # then the lead's ids stand after the template's, and not after the question
        asked = example.question + (example.lead if self._lead and not chat else "")
        as_read = self.decode(self._tokenizer.encode(asked)).strip()  # some tokenizers change what they are given
        start = question_start(ids, as_read, self.decode) if example.question else None
        return start if start and self.decode(ids[:start]).strip() else None

    def bare(self, text: str) -> list[int]:
        """Ids of a text without BOS: as many as the text takes inside a prompt."""
        return self._tokenizer.encode(text)[self._added :] if text else []


class Runner:
    """Runs a plan on a model. Everything that can be wrong with it is found here, before the first example runs.

    chat, lead: see Prompts. question_after: the same tokens, but the policy reads the context alone, and the question
    comes later (conversation.py). Raises FastKVError where a prompt and its answer do not fit the model under one of
    the policies, where the model has no tokenizer, and where a question cannot come later.
    """

    def __init__(
        self,
        llm: LLM,
        plan: Plan,
        specs: list[PolicySpec],
        chat: bool = False,
        lead: bool = True,
        question_after: bool = False,
    ) -> None:
        self._llm, self._plan, self._specs, self._question_after = llm, plan, specs, question_after
        self.prompts = Prompts(llm, chat, lead)
        for task in plan.tasks:
            if task.most is not None and plan.count(task) > task.most:
                raise FastKVError(
                    f"task {task.name} has {task.most} examples in all, not {plan.examples}", setting="examples"
                )
            lengths = plan.lengths if task.has_length else (self._room(task),)
            for length, spec in product(lengths, specs):
                self._check_room(task, length, spec.policy)
                self._check_map(spec)
                check_stored(llm, spec, length, plan.answer_tokens(task))
        for task in plan.tasks:
            for own_or_length in plan.lengths_of(task):
                self.question(Slot(task.name, own_or_length, plan.depths[0] if task.has_depth else None, 0))

    def question(self, slot: Slot) -> Question:
        """Write an example. Raises FastKVError where the slot is too short for its task, or has no question apart."""
        example = self._example(slot)
        ids = self.prompts.ids(example)
        if not self._question_after:
            return Question(slot, example, ids)
        asked_at = self.prompts.asked_at(example, ids)
        if asked_at is None:
            raise FastKVError(
                f"example {slot.id} has no question that stands after its context: leave it out of --task",
                setting="question_after",
            )
        return Question(slot, example, ids, asked_at)

    def answer(self, question: Question, spec: PolicySpec) -> Record:
        """Put a question to the model under a policy."""
        slot, example, task = question.slot, question.example, self._plan.task(question.slot.task)
        with stored_as(self._llm, spec):
            output, context = self._put(question, spec.policy, self._plan.answer_tokens(task))
        return Record(
            id=slot.id,
            policy=spec.label,
            prompt_sha256=question.checksum,
            answers=example.answers,
            prediction=output.text,
            score=task.score(output.text, example),
            cut=example.cut,
            **context,
            **asdict(slot),
            **{name: getattr(output.metrics, name) for name in MEASURED},
        )

    def _put(self, question: Question, policy: Policy, max_tokens: int) -> tuple[Output, dict[str, Any]]:
        """The answer, and what the record says of a context that was read before."""
        ids, at = question.ids, question.asked_at
        if at is None:
            return self._llm.generate(ids, SamplingParams(max_tokens=max_tokens), policy=policy), {}
        talk = Conversation(self._llm, policy, list(ids[:at]))
        output = talk.ask(list(ids[at:]), max_tokens, getattr(ids, "ends", ()))
        return output, {"context_tokens": at, "context_s": talk.context_s}

    def warm_up(self) -> None:
        """An answer that nobody sees: the first one of a process takes longer than it would later on."""
        self.answer(self.question(self._plan.slots()[0]), self._specs[0])

    def run(self, results: Results, report: Report = lambda record, done, total: None) -> None:
        """Add the records that `results` lacks, in order. Texts are drawn as they are needed."""
        slots = self._plan.slots()
        there = {(record.id, record.policy) for record in results.records}
        texts = {record.id: record.prompt_sha256 for record in results.records}
        done, total = len(results.records), len(slots) * len(self._specs)
        for number, slot in enumerate(slots):
            # Each time another one first: the first one to read a new text is a little slower.
            turn = number % len(self._specs)
            in_turn = self._specs[turn:] + self._specs[:turn]
            missing = [spec for spec in in_turn if (slot.id, spec.label) not in there]
            if not missing:
                continue
            question = self.question(slot)
            if texts.setdefault(slot.id, question.checksum) != question.checksum:
                raise FastKVError(
                    f"example {slot.id} was another text when the run began; name another file", setting="output"
                )
            for spec in missing:
                record = self.answer(question, spec)
                results.add(record)
                done += 1
                report(record, done, total)

    def _example(self, slot: Slot) -> Example:
        task, prompts = self._plan.task(slot.task), self.prompts
        room = 0 if task.has_length else self._room(task)
        return task.write(Draw(slot, self._plan.seed, prompts.count, prompts.bare, prompts.decode, room))

    def _room(self, task: Task) -> int:
        """Tokens that a prompt may have whose length is its own: every policy reads all of it."""
        if self._plan.longbench_tokens is not None:
            return self._plan.longbench_tokens
        policies = [spec.policy for spec in self._specs]
        return longest_prompt(self._llm.config, policies, self._plan.answer_tokens(task))

    def _check_map(self, spec: PolicySpec) -> None:
        """FastKVError for layers that read others, where the question comes later."""
        if self._question_after and spec.share_layers is not None:
            raise FastKVError("share_layers, which a policy has, does not go with it", setting="question_after")

    def _check_room(self, task: Task, length: int, policy: Policy) -> None:
        """FastKVError unless a prompt of `length` tokens and its answer fit under this policy."""
        setting = "length" if task.has_length else "longbench_tokens"
        answer = self._plan.answer_tokens(task)
        try:
            limit = position_limit(self._llm.config, policy, length)
        except FastKVError as error:
            raise FastKVError(str(error), setting=setting) from None
        if answer >= limit:
            raise _no_room(answer, limit)
        if length + answer > limit:
            raise FastKVError(
                f"{length} tokens and an answer of {answer} for task {task.name} are more than the {limit} that the "
                f"model reads under policy {policy.name}; ask for at most {limit - answer}",
                setting=setting,
            )


def longest_prompt(config: ModelConfig, policies: Sequence[Policy], answer: int) -> int:
    """Tokens of the longest prompt that all of `policies` read, with room for an answer of `answer` tokens."""
    limit, window = config.context_length, config.sliding_window
    if window is not None and any(drops_tokens(policy, config.n_layers, limit) for policy in policies):
        limit = min(limit, window)
    if answer >= limit:
        raise _no_room(answer, limit)
    return limit - answer


def _no_room(answer: int, limit: int) -> FastKVError:
    message = f"an answer of {answer} tokens leaves no room for a prompt in the {limit} that the model reads"
    return FastKVError(message, setting="max_tokens")
