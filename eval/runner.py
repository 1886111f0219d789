"""The run: every example once for each policy, policies in turn, so that a run stopped anywhere is balanced."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from fastkv.engine.llm import LLM
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError
from fastkv.eval.example import Draw, Example, Slot, Task
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.prompts import Prompts
from fastkv.eval.results import Record, Results
from fastkv.eval.room import check_room, longest_prompt
from fastkv.eval.scoring import score

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


class Runner:
    """Runs a plan on a model. Everything that can be wrong with it is found here, before the first example runs."""

    def __init__(self, llm: LLM, plan: Plan, specs: list[PolicySpec], prompts: Prompts) -> None:
        self._llm, self._plan, self._specs, self._prompts = llm, plan, specs, prompts
        for task in plan.tasks:
            if task.most is not None and plan.count(task) > task.most:
                raise FastKVError(
                    f"task {task.name} has {task.most} examples in all, not {plan.examples}", setting="examples"
                )
            lengths = plan.lengths if task.has_length else (self._room(task),)
            setting = "length" if task.has_length else "longbench_tokens"
            for length, spec in product(lengths, specs):
                check_room(llm.config, spec.policy, length, plan.answer_tokens(task), task.name, setting)
        for task in plan.tasks:
            for own_or_length in plan.lengths_of(task):
                self.example(Slot(task.name, own_or_length, plan.depths[0] if task.has_depth else None, 0))

    def example(self, slot: Slot) -> Example:
        """The text of an example. Raises FastKVError where the slot is too short for its task."""
        task = self._plan.task(slot.task)
        prompts, room = self._prompts, 0 if task.has_length else self._room(task)
        return task.write(Draw(slot, self._plan.seed, prompts.count, prompts.bare, prompts.text, room))

    def warm_up(self) -> None:
        """An answer that nobody sees: the first one of a process takes longer than it would later on."""
        slot = self._plan.slots()[0]
        example = self.example(slot)
        self._answer(slot, example, self._prompts.ids(example), self._specs[0])

    def run(self, results: Results, report: Report = lambda record, done, total: None) -> None:
        """Add the records that `results` lacks, in order. Texts are drawn as they are needed."""
        slots = self._plan.slots()
        there = {(record.id, record.policy) for record in results.records}
        texts = {record.id: record.prompt_sha256 for record in results.records}
        done, total = len(results.records), len(slots) * len(self._specs)
        for number, slot in enumerate(slots):
            missing = [one for one in self._in_turn(number) if (slot.id, one.label) not in there]
            if not missing:
                continue
            example = self.example(slot)
            ids = self._prompts.ids(example)
            if texts.setdefault(slot.id, checksum(ids)) != checksum(ids):
                raise FastKVError(f"--output: example {slot.id} was another text when the run began; name another file")
            for spec in missing:
                record = self._answer(slot, example, ids, spec)
                results.add(record)
                done += 1
                report(record, done, total)

    def _in_turn(self, number: int) -> list[PolicySpec]:
        """The specs, each time another one first: whoever comes first at a new text is a little slower."""
        turn = number % len(self._specs)
        return self._specs[turn:] + self._specs[:turn]

    def _answer(self, slot: Slot, example: Example, ids: list[int], spec: PolicySpec) -> Record:
        task = self._plan.task(slot.task)
        params = SamplingParams(max_tokens=self._plan.answer_tokens(task))
        output = self._llm.generate(ids, params, policy=spec.policy)
        metrics = output.metrics
        return Record(
            id=slot.id,
            policy=spec.label,
            task=slot.task,
            length=slot.length,
            depth=slot.depth,
            index=slot.index,
            prompt_sha256=checksum(ids),
            prompt_tokens=metrics.prompt_tokens,
            new_tokens=metrics.new_tokens,
            answers=example.answers,
            prediction=output.text,
            score=score(task.rule, output.text, example),
            ttft_s=metrics.ttft_s,
            decode_tokens_per_s=metrics.decode_tokens_per_s,
            kv_bytes=metrics.kv_bytes,
            kv_full_bytes=metrics.kv_full_bytes,
            kv_entries=metrics.kv_entries,
            kv_full_entries=metrics.kv_full_entries,
            cut=example.cut,
        )

    def _room(self, task: Task) -> int:
        """The tokens that a prompt of this task may have where its texts have lengths of their own."""
        if self._plan.longbench_tokens is not None:
            return self._plan.longbench_tokens
        policies = [spec.policy for spec in self._specs]
        return longest_prompt(self._llm.config, policies, self._plan.answer_tokens(task))


def checksum(ids: list[int]) -> str:
    """The beginning of the SHA-256 of token ids."""
    return hashlib.sha256(array("q", ids).tobytes()).hexdigest()[:16]
