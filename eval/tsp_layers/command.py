"""fastkv-eval tsp-layers: after which layer, and at which rate, should this model drop tokens?

It measures on the user's own prompts, or on generated questions, how the importance of tokens settles with depth
(importance.py), advises a TSP layer and rate by a rule that it prints (advice.py), and has that advice checked by
running it (check.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastkv.cache.policies import FastKV
from fastkv.cache.policy import Policy
from fastkv.console.files import write_whole
from fastkv.console.parser import DONE
from fastkv.console.progress import ProgressLine
from fastkv.console.prompt import read_prompt
from fastkv.console.words import counted
from fastkv.engine.llm import LLM
from fastkv.engine.plan import position_limit
from fastkv.errors import FastKVError, writable
from fastkv.eval.policy_spec import PolicySpec, parse_policies
from fastkv.eval.run import load, plan_of
from fastkv.eval.runner import Runner
from fastkv.eval.tsp_layers.advice import RULE, candidates, default_setting, highest_void_rate, search
from fastkv.eval.tsp_layers.check import AnswerCheck, Check, ContinuationCheck, Show
from fastkv.eval.tsp_layers.importance import Recorder, mean, measure
from fastkv.eval.tsp_layers.report import advice_line, check_table, importance_tables, report

COMPARED = 32  # greedy tokens of each prompt that has no answer


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status. Raises FastKVError for a user's mistake."""
    _policy(args)  # before the model is loaded
    llm, _ = load(args)
    policy = _policy(args, llm.config.n_layers)
    if llm.config.n_layers < 2:
        raise FastKVError("the model has one layer: there is none after it to save work in", setting="model")
    rates = tuple(sorted(set(args.tsp_rate)))
    with ProgressLine(None if args.quiet else sys.stderr) as progress:

        def show(what: str, done: int, total: int) -> None:
            progress.show(f"{what}: {done} of {counted(total, 'prompt')}", done, total)

        prompts, check = _prompts_and_check(args, llm, policy, show)
        parts = []
        for done, ids in enumerate(prompts):
            show("measuring", done, len(prompts))
            parts.append(measure(llm, ids, policy, rates))
        progress.clear()
        importance, lengths = mean(parts), [len(ids) for ids in prompts]
        print(importance_tables(importance), flush=True)
        default = default_setting(policy, llm.config, lengths)
        found = search(check, default, candidates(importance, policy, llm.config, lengths))
    print(RULE)
    print(check_table(found.full, found.checked))
    print(advice_line(found))
    if args.json is not None:
        content = report(args, llm, lengths, importance, found)
        write_whole(args.json, json.dumps(content, default=str) + "\n", "json")
    if args.plot is not None:
        from fastkv.eval.tsp_layers.plot import draw

        name, shortest, longest = writable(Path(args.model).name), min(lengths), max(lengths)
        title = f"{name}: {counted(len(prompts), 'prompt')} of {shortest:,} to {longest:,} tokens"
        draw(importance, default, found.advice, title, args.plot)
    return DONE


def _policy(args: argparse.Namespace, n_layers: int | None = None) -> FastKV:
    """What is to be advised on: its TSP layer and rate are the default that the advice must not be worse than."""
    spec = parse_policies([args.policy], n_layers)[0]
    policy = spec.policy
    if spec.share_layers is not None:
        raise FastKVError(
            f"--policy {args.policy}: the advice is for layers that read none other; leave share_layers out"
        )
    if spec.kv_dtype is not None:
        raise FastKVError(
            f"--policy {args.policy}: kv_dtype here is that of one policy among others: take --kv-dtype {spec.kv_dtype}"
        )
    if not isinstance(policy, FastKV):
        raise FastKVError(f"--policy {args.policy}: has no TSP layer; give fastkv, with settings or without")
    if isinstance(policy.tsp_layer, tuple) or isinstance(policy.tsp_rate, tuple):
        raise FastKVError(f"--policy {args.policy}: the advice is one TSP layer and one rate; leave the others out")
    if policy.tsp_len is not None:
        raise FastKVError(f"--policy {args.policy}: the advice is a rate; leave tsp_len out")
    if max(args.tsp_rate) <= highest_void_rate(policy):
        raise FastKVError(f"--policy {args.policy}: no rate is above its kv_retention; add a higher --tsp-rate")
    return policy


def _prompts_and_check(
    args: argparse.Namespace, llm: LLM, policy: FastKV, show: Show
) -> tuple[Sequence[list[int]], Check]:
    """Token ids of every prompt, and the check that they make. All is found right before anything runs."""
    recorder = Recorder(policy)
    if args.prompt:
        compared = args.max_tokens or COMPARED
        prompts = [_own_prompt(llm, name, recorder, compared, args.chat) for name in args.prompt]
        return prompts, ContinuationCheck(llm, prompts, compared, show)
    plan = plan_of(args, llm.config.context_length)
    runner = Runner(llm, plan, [PolicySpec(recorder.name, recorder)], args.chat)
    questions = [runner.question(slot) for slot in plan.slots()]
    return [question.ids for question in questions], AnswerCheck(runner, questions, show)


def _own_prompt(llm: LLM, name: str, policy: Policy, n_tokens: int, chat: bool) -> list[int]:
    """Token ids of a file; FastKVError for one that cannot be read, or that leaves no room for `n_tokens`."""
    if llm.tokenizer is None:
        raise FastKVError("the model has no tokenizer, and a prompt is a text", setting="model")
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
    return ids
