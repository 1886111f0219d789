"""The prompts of fastkv-eval tsp-layers: a user's own files, or generated questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastkv.console.prompt import read_prompt
from fastkv.engine.request import position_limit
from fastkv.errors import FastKVError
from fastkv.eval.layer_check import Question
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.prompts import Prompts
from fastkv.eval.runner import Plan, Runner

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.llm import LLM


def questions(llm: LLM, plan: Plan, policy: Policy, chat: bool) -> list[Question]:
    """The examples of a plan; FastKVError, before any is written, where they do not fit the model under `policy`."""
    prompts = Prompts(llm, chat)
    runner = Runner(llm, plan, [PolicySpec("fastkv", policy)], prompts)
    found = []
    for slot in plan.slots():
        task, example = plan.task(slot.task), runner.example(slot)
        group = slot.task if slot.length is None else f"{slot.task}, {slot.length:,} tokens"
        found.append(Question(group, prompts.ids(example), example, task.rule, plan.answer_tokens(task)))
    return found


def own_prompts(llm: LLM, files: Sequence[str], policy: Policy, n_tokens: int, chat: bool) -> list[list[int]]:
    """Token ids of each file; FastKVError for one that cannot be read, or that leaves no room for `n_tokens`."""
    if llm.tokenizer is None:
        raise FastKVError("the model has no tokenizer, and a prompt is a text", setting="model")
    found = []
    for name in files:
        text = read_prompt(name)
        ids = llm.chat([{"role": "user", "content": text}]) if chat else llm.tokenizer.encode(text)
        try:
            limit = position_limit(llm.config, policy, len(ids))
        except FastKVError as error:
            raise FastKVError(f"--prompt {name}: {error}") from None
        if len(ids) + n_tokens > limit:
            raise FastKVError(
                f"--prompt {name}: {len(ids)} tokens and {n_tokens} more to compare are beyond the {limit} that the "
                "model reads; shorten it, or lower --max-tokens"
            )
        found.append(ids)
    return found
