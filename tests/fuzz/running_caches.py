"""What every policy promises of every model: checked on one case against slow twins, or against another way to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from caches import FullByHead, SlowTwin, live_entries
from fuzz.outcomes import require
from fuzz.rounding import require_close, require_same
from fuzz.slow_prefill import Entries, slow_prefill
from fuzz.tiny_models import *  # noqa: F403 (a program that shows a fault again needs them)
from fuzz.tiny_models import CONTEXT, Model, load, prompt
from torch import Tensor

from fastkv import LLM, FullKV, Prefill, SamplingParams
from fastkv.cache.catalogue import POLICIES
from fastkv.cache.kv_cache import KVCache
from fastkv.cache.policy import Policy, plan_layers
from fastkv.cache.setting import settings_of

Kept = list[list[list[int]]]
# What says how much is held at a time, with the sizes in which it never matters for the short prompts of other tests.
PIECES = {
    "fastkv.engine.projection.CHUNK": 4096,
    "fastkv.engine.attention.QUERY_BLOCK": 512,
    "fastkv.cache.scores._LEAST_QUERIES": 32,
    "fastkv.engine.merged_attention._BLOCK": 1024,
}
VALUES = ("fastkv.cache.scores._BLOCK_VALUES", "fastkv.engine.output_norms._CHUNK_VALUES")


@dataclass(frozen=True)
class Case:
    """lengths: of prompts; where one is looked at, of that. new: tokens after it. pieces: of PIECES and VALUES."""

    model: Model
    policy: str
    settings: tuple[tuple[str, Any], ...] = ()
    lengths: tuple[int, ...] = (40,)
    new: int = 3
    seed: int = 0
    pieces: int = 7
    narrow: bool = False

    def smaller(self) -> Iterator[Case]:
        for left_out in range(len(self.settings)):
            yield replace(self, settings=self.settings[:left_out] + self.settings[left_out + 1 :])
        if len(self.lengths) > 1:
            yield replace(self, lengths=self.lengths[1:])
            yield replace(self, lengths=self.lengths[:-1])
        for changes in (
            {"rope": "default"},
            {"biases": False},
            {"tied": False},
            {"family": "LlamaForCausalLM"},
            {"group": 1},
        ):
            plain = replace(self.model, **changes)
            if plain != self.model:
                yield replace(self, model=plain)

    def made(self, **more: Any) -> Policy:
        """The policy; `headkv` with a table for the model."""
        settings = {**dict(self.settings), **more}
        if self.policy == "headkv":
            generator = torch.Generator().manual_seed(self.seed)
            settings["head_scores"] = torch.rand(
                self.model.n_layers, self.model.n_kv_heads, generator=generator
            ).tolist()
        policy = POLICIES[self.policy](**settings)
        policy.validate(self.model.n_layers, self.model.n_kv_heads)
        return policy

    def prompts(self) -> list[list[int]]:
        return [prompt(length, self.seed + place) for place, length in enumerate(self.lengths)]


# --- budgets of the whole prompt ---


def run_unbounded(case: Case) -> None:
    """A budget of all that there is keeps all that there is: the full cache, its logits and its tokens."""
    llm, (ids, *_), most = load(case.model), case.prompts(), 2 * CONTEXT
    wanted = {"kv_len": most, "min_tokens": most, "decay": 1.0, "read_len": most}
    wanted |= {"tau": 2.0} if case.policy == "sinkrouter" else {}
    tsp = (
        {"tsp_len": tuple(most + 1 - place for place in range(_layers_of(case)))}
        if _layers_of(case) > 1
        else {"tsp_len": most}
    )
    known = settings_of(POLICIES[case.policy])
    policy = case.made(**{name: value for name, value in {**wanted, **tsp}.items() if name in known})
    full, same = llm.prefill(ids, FullKV(), case.new), llm.prefill(ids, policy, case.new)
    require_close(same.logits, full.logits, "a budget of everything gives the logits of the full cache")
    require(_kept(same) == _kept(full), "a budget of everything keeps everything")
    for token in prompt(case.new, case.seed + 99):
        found, expected = (llm.decode(pre.cache, torch.tensor([token])) for pre in (same, full))
        require_close(found, expected, "after a budget of everything, decoding is that of the full cache")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first, second = (lambda of=of: llm.generate(ids, params, of).token_ids for of in (policy, FullKV()))
    require_same(llm, first, second, "a budget of everything gives the tokens of the full cache")


def _layers_of(case: Case) -> int:
    layers = dict(case.settings).get("tsp_layer")
    return len(layers) if isinstance(layers, tuple) else 1


# --- recomputation from what was kept ---


def run_recomputed(case: Case) -> None:
    """Whatever was chosen: logits and entries are those of the tokens that were chosen, in plain loops."""
    llm, (ids, *_), policy = load(case.model), case.prompts(), case.made()
    pre = llm.prefill(ids, policy, case.new)
    _check_selection(case, policy, pre)
    seen, new = [of_layer[0] for of_layer in pre.tokens], torch.tensor([ids])
    if len(seen[0]) < len(ids):  # a first pass has chosen a prompt of its own
        new, seen = new[:, seen[0]], [torch.searchsorted(seen[0], of_layer) for of_layer in seen]
    logits, entries = slow_prefill(llm, new, seen)
    require_close(pre.logits, logits, "the logits are those of the tokens that each layer saw")
    _check_entries(pre, entries, [[of_layer[0].tolist()] * case.model.n_kv_heads for of_layer in pre.tokens], pre.kept)
    _check_decoding(llm, pre.cache, case)


def run_continued(case: Case) -> None:
    """The same for new tokens after a cache, from which a policy may choose again."""
    llm, (ids, *_), policy = load(case.model), case.prompts(), case.made()
    cache = llm.prefill(ids, policy, 0).cache
    start, new = cache.position, torch.tensor([prompt(case.pieces, case.seed + 99)])
    heads = range(case.model.n_kv_heads)
    earlier = [[live_entries(cache.pool, layer, 0, head) for head in heads] for layer in range(case.model.n_layers)]
    positions = [_places(cache.positions(layer)) for layer in range(case.model.n_layers)]
    again = llm.prefill(new, policy, case.new, cache=cache)
    logits, entries = slow_prefill(llm, new, [of_layer[0] - start for of_layer in again.tokens], start, earlier)
    require_close(again.logits, logits, "new tokens attend to what was kept, and to one another")
    for of_layer, tokens in zip(positions, again.tokens, strict=True):
        for of_head in of_layer:
            of_head += tokens[0].tolist()
    _check_entries(again, entries, positions, [cache.positions(layer) for layer in range(case.model.n_layers)])
    _check_decoding(llm, cache, case)


def run_full(case: Case) -> None:
    """A full cache, in whichever layout, at once or piece by piece, whatever the sliding window."""
    llm, (ids, *_) = load(case.model), case.prompts()
    policy = FullByHead() if case.narrow else FullKV()
    whole, cut = llm.prefill(ids, FullKV(), case.new), max(1, len(ids) * case.pieces // 60)
    logits, _ = slow_prefill(llm, torch.tensor([ids]), [torch.arange(len(ids))] * case.model.n_layers)
    require_close(whole.logits, logits, "the logits of a full cache are those of plain loops")
    pre = llm.prefill(ids[:cut], policy, case.new)
    if cut < len(ids):
        pre = llm.prefill(ids[cut:], policy, case.new, cache=pre.cache)
    require_close(pre.logits, logits, "a prompt in pieces is the prompt")
    for cache in (pre.cache, whole.cache):
        _check_decoding(llm, cache, case)


def _check_entries(pre: Prefill, entries: list[Entries], positions: Kept, kept: list[Tensor]) -> None:
    """The cache holds, of all entries at these positions, those that were kept."""
    for layer, of_layer in enumerate(entries):
        for head, (keys, values) in enumerate(of_layer):
            places = [positions[layer][head].index(place) for place in _places(kept[layer])[head]]
            found = live_entries(pre.cache.pool, layer, 0, head)
            require_close(found[0], keys[places], "the cache holds the keys that were kept")
            require_close(found[1], values[places], "the cache holds the values that were kept")


def _check_decoding(llm: LLM, cache: KVCache, case: Case) -> None:
    """A token at a time, then the last two of them at once; all is read (tests/test_read_few.py has the others)."""
    cache.reader = None
    slow, new = SlowTwin(llm, cache, cache.position), torch.tensor([prompt(case.new, case.seed + 98)])
    for step in new.split([*[1] * max(0, case.new - 2), min(2, case.new)], dim=1):
        require_close(llm.decode(cache, step), slow.run(step), "decoding attends to what was kept")


def _check_selection(case: Case, policy: Policy, pre: Prefill) -> None:
    (length, *_), plans = case.lengths, plan_layers(policy, case.model.n_layers, case.lengths[0])
    counts = [[len(head) for head in layer] for layer in _kept(pre)]
    for plan, of_layer, tokens in zip(plans, _kept(pre), pre.tokens, strict=True):
        for head in of_layer:
            require(head == sorted(set(head)), "what is kept ascends, each once", head)
            require(set(head) <= set(tokens[0].tolist()), "what is kept was seen", (head, tokens))
            window = min(policy.window, length)
            require(not window or head[-window:] == list(range(length - window, length)), "the window is kept", head)
            planned_here = policy.per_head or plan.least <= len(head) <= plan.kept
            require(planned_here, "as many are kept as planned", (len(head), plan))
        require(tokens.shape[1] <= plan.seen, "no more tokens are seen than planned", (tokens, plan))
    found, planned = [sum(heads) for heads in counts], [case.model.n_kv_heads * plan.kept for plan in plans]
    totals = ([sum(found)], [sum(planned)], [sum(planned)]) if policy.over_layers else (found, planned, planned)
    if any(plan.least < plan.kept for plan in plans):
        totals = (found, [case.model.n_kv_heads * plan.least for plan in plans], planned)
    between = all(low <= here <= high for here, low, high in zip(*totals, strict=True))
    require(between, "as many entries are kept as planned", totals)
    require(pre.cache.lengths.squeeze(1).tolist() == counts, "the cache knows how many entries it has", counts)


# --- another way to the same ---


def run_twice(case: Case) -> None:
    """To the last bit."""
    llm, (ids, *_), policy = load(case.model), case.prompts(), case.made()
    first, second = (llm.prefill(ids, policy, case.new) for _ in range(2))
    require(_kept(first) == _kept(second), "the same prompt keeps the same")
    require(torch.equal(first.logits, second.logits), "the same prompt gives the same logits")
    params = SamplingParams(max_tokens=4, temperature=0.9, seed=case.seed, ignore_eos=True)
    tokens = [llm.generate(ids, params, policy).token_ids for _ in range(2)]
    require(tokens[0] == tokens[1], "the same seed gives the same tokens")


def run_batch(case: Case) -> None:
    """Each prompt of a list, with settings of its own, gets the tokens that it gets alone."""
    llm, prompts, policy = load(case.model), case.prompts(), case.made()
    heat = [0.0, 0.8, 0.0, 1.2]
    params = [
        SamplingParams(
            max_tokens=1 + (case.seed + place) % 6,
            temperature=heat[(case.seed + place) % 4],
            seed=place,
            ignore_eos=True,
        )
        for place in range(len(prompts))
    ]
    alone = lambda: [llm.generate(ids, one, policy).token_ids for ids, one in zip(prompts, params, strict=True)]  # noqa: E731
    together = lambda: [out.token_ids for out in llm.generate(prompts, params, policy, batch_size=case.new)]  # noqa: E731
    require_same(llm, together, alone, "a prompt in a list is answered as alone")


def run_chunks(case: Case) -> None:
    """How much is computed at a time changes neither what is kept nor, but for rounding, the logits."""
    llm, (ids, *_), policy = load(case.model), case.prompts(), case.made()

    def whole() -> tuple[Kept, Tensor]:
        pre = llm.prefill(ids, policy, case.new)
        return _kept(pre), pre.logits

    def in_chunks() -> tuple[Kept, Tensor]:
        with ExitStack() as stack:
            for name in PIECES:
                stack.enter_context(patch(name, case.pieces))
            for name in VALUES:
                stack.enter_context(patch(name, {"cpu": case.pieces * 16}))
            stack.enter_context(patch("fastkv.engine.prefill._propagated_only_pays", lambda *_: case.narrow))
            return whole()

    found, expected = in_chunks(), whole()
    if found[0] != expected[0]:  # it may be the rounding
        require_same(llm, lambda: in_chunks()[0], lambda: whole()[0], "the size of chunks does not change what is kept")
    require_close(found[1], expected[1], "the size of chunks does not change the logits")


def _kept(pre: Prefill) -> Kept:
    """Positions of each layer and head of the first sequence."""
    return [_places(layer) for layer in pre.kept]


def _places(positions: Tensor) -> list[list[int]]:
    """int64 [B, Hkv, n], -1 after the last of a short head -> those of each head of the first sequence."""
    return [[place for place in head if place >= 0] for head in positions[0].tolist()]
