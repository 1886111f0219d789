"""Sampling: distributions are counted, filters are shown to do something, and no sequence depends on another."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkv import FastKVError, SamplingParams
from fastkv.engine.sampler import NOT_FINITE, Features, Sampler, not_finite_error
from fastkv.errors import FaultError

PROBABILITIES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
LOGITS = PROBABILITIES.log()
SLOTS, STEPS = 100, 200
DRAWS = SLOTS * STEPS
CPU = torch.device("cpu")
NO_PROMPT = torch.zeros(1, 0, dtype=torch.int64)


def started(params: SamplingParams, prompt: Tensor = NO_PROMPT, vocab_size: int = 5) -> Sampler:
    """A sampler with one slot, at work."""
    sampler = Sampler(1, vocab_size, CPU)
    sampler.start(0, params, prompt)
    return sampler


def one(sampler: Sampler, logits: Tensor) -> int:
    """The next token of its only slot, logits [V]."""
    return int(sampler.sample(logits[None], torch.tensor([True])))


def shares(logits: Tensor, **settings: Any) -> Tensor:
    """How often each token is drawn, over seeds and over steps: [V]."""
    sampler = Sampler(SLOTS, len(logits), CPU)
    for slot in range(SLOTS):
        sampler.start(slot, SamplingParams(seed=slot, **settings), NO_PROMPT)
    batch, active = logits.repeat(SLOTS, 1), torch.ones(SLOTS, dtype=torch.bool)
    tokens = torch.cat([sampler.sample(batch, active) for _ in range(STEPS)])
    return torch.bincount(tokens, minlength=len(logits)) / DRAWS


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Within 4.5 standard deviations of a binomial share: a fair sampler fails once in 100 000 draws of a seed."""
    spread = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 4.5 * spread + 1e-9).all(), (found, expected)


def test_draws_follow_the_softmax() -> None:
    found = shares(LOGITS, temperature=1.0)
    assert_close(found, PROBABILITIES)
    chi_square = float(((found - PROBABILITIES) ** 2 / PROBABILITIES).sum()) * DRAWS
    assert chi_square < 18.5, "a fair sampler: once in 1,000 times, of 4 degrees of freedom"


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    assert (expected - PROBABILITIES).abs().max() > 0.05
    assert_close(shares(LOGITS, temperature=temperature), expected)


def renormalised(keep: list[int]) -> Tensor:
    kept = torch.zeros(5)
    kept[keep] = PROBABILITIES[keep]
    return kept / kept.sum()


@pytest.mark.parametrize(("k", "keep"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])])
def test_top_k(k: int, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, top_k=k), renormalised(keep))


@pytest.mark.parametrize(
    ("p", "keep"), [(0.01, [0]), (0.39, [0]), (0.5, [0, 1]), (0.8, [0, 1, 2]), (0.97, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, top_p=p), renormalised(keep))


@pytest.mark.parametrize(("p", "keep"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 3]), (0.5, [0, 1]), (1.0, [0])])
def test_min_p_is_relative_to_the_best(p: float, keep: list[int]) -> None:
    assert_close(shares(LOGITS, temperature=1.0, min_p=p), renormalised(keep))


def test_filters_apply_after_the_temperature() -> None:
    """At temperature 3 the flat distribution needs more tokens to reach the same p."""
    flat = (LOGITS / 3).softmax(0)
    expected = torch.zeros(5)
    expected[:3] = flat[:3] / flat[:3].sum()
    assert flat[:2].sum() < 0.55 < flat[:3].sum() < 0.75
    assert_close(shares(LOGITS, temperature=3.0, top_p=0.55), expected)


@pytest.mark.parametrize("settings", [{"top_p": 1e-46}, {"repetition_penalty": 1e6}, {"min_p": 1.0}, {"top_k": 1}])
def test_extreme_settings_leave_the_best_token(settings: dict[str, float]) -> None:
    """A top_p that float32 rounds to zero dropped every token, and the draw from nothing gave token 0."""
    sampler = started(SamplingParams(temperature=1.0, seed=0, **settings), torch.arange(5)[None])  # type: ignore[arg-type]
    assert [one(sampler, LOGITS.flip(0)) for _ in range(200)] == [4] * 200


def test_temperature_zero_is_greedy_whatever_the_filters() -> None:
    sampler = started(SamplingParams(top_k=3, top_p=0.5, seed=0))
    assert one(sampler, LOGITS.flip(0)) == 4


def test_repetition_penalty_sees_the_prompt_and_the_generated_tokens() -> None:
    logits = torch.tensor([1.0, 0.9, 0.8, 0.7])
    sampler = started(SamplingParams(repetition_penalty=1.5), torch.tensor([[0]]), 4)
    # 0 is in the prompt; each token drawn is penalised from then on; when all are, the order is the old one
    assert [one(sampler, logits) for _ in range(5)] == [1, 2, 3, 0, 0]


def test_same_seed_same_tokens_and_other_seed_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sampler = started(SamplingParams(temperature=1.0, seed=seed))
        return [one(sampler, LOGITS) for _ in range(50)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    shares(LOGITS, temperature=1.0)
    assert torch.equal(torch.rand(4), expected)


BAD = [
    ("max_tokens", [0, -1, 1.5, "3", True]),
    ("temperature", [-0.1, math.nan, math.inf, "hot", None]),
    ("top_k", [-1, 1.5, "3"]),
    ("top_p", [0, 0.0, -0.5, 1.01, math.nan, "x"]),
    ("min_p", [-0.1, 1.01, math.nan, "x"]),
    ("repetition_penalty", [0, -1, math.nan, math.inf]),
    ("seed", [-1, 1.5, 2**63, "x"]),
    ("stop", ["", ("a", ""), (1,)]),
]


@pytest.mark.parametrize(("setting", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(FastKVError, match=setting) as caught:
        SamplingParams(**{setting: value})
    assert caught.value.setting == setting


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


# --- one call for all -------------------------------------------------------------------------------------------------

VOCABULARY = 1001  # odd: sequences do not begin at multiples of a vector's width
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"repetition_penalty": 1.7},
    {"temperature": 0.7, "top_k": 30, "seed": 2},
    {"temperature": 1.3, "top_p": 0.8, "seed": 3},
    {"temperature": 0.9, "min_p": 0.02, "seed": 4},
    {"temperature": 1.2, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
    {"temperature": 1e-320, "seed": 6},
    {"temperature": 1e300, "top_p": 1.0, "seed": 7},
]
COUNT = len(SETTINGS)
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = torch.randint(VOCABULARY, (COUNT, 50), generator=GENERATOR)
STREAM = torch.randn(30, COUNT, VOCABULARY, generator=GENERATOR) * 3  # the logits of 30 steps
STREAM = STREAM.bfloat16().float()  # with ties


def mixed(order: list[int], n_slots: int = COUNT) -> Sampler:
    """A sampler whose slot i holds the sequence order[i]."""
    sampler = Sampler(n_slots, VOCABULARY, CPU)
    for slot, which in enumerate(order):
        sampler.start(slot, SamplingParams(**SETTINGS[which]), PROMPTS[which])
    return sampler


@functools.cache
def alone(which: int) -> list[int]:
    """The tokens of a sequence that has a sampler for itself."""
    sampler = mixed([which], n_slots=1)
    return [one(sampler, logits[which]) for logits in STREAM]


@pytest.mark.parametrize("order", [list(range(COUNT)), list(reversed(range(COUNT))), [3, 0, 6], [6, 2, 8, 1]])
def test_a_sequence_has_the_same_tokens_alone_and_in_any_batch_and_slot(order: list[int]) -> None:
    sampler, active = mixed(order), torch.ones(len(order), dtype=torch.bool)
    tokens = torch.stack([sampler.sample(STREAM[step, order], active) for step in range(len(STREAM))], dim=1)
    assert tokens.tolist() == [alone(which) for which in order]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_only_active_slots_advance(dtype: torch.dtype) -> None:
    """Slots take part in turns, and those at rest are computed all the same: nothing comes of it.

    What they are given then is not theirs, and is not even finite.
    """
    sampler = mixed(list(range(COUNT)))
    steps, found = [0] * COUNT, [[] for _ in range(COUNT)]  # type: list[int], list[list[int]]
    for turn in range(40):
        active = [slot for slot in range(COUNT) if (turn * 7 + slot * 5) % 3]
        logits = torch.full((COUNT, VOCABULARY), math.nan) if turn % 2 else STREAM[0].flip(1).clone()
        for slot in active:
            logits[slot] = STREAM[steps[slot], slot]
        tokens = sampler.sample(logits, torch.tensor([slot in active for slot in range(COUNT)]).to(dtype))
        for slot in active:
            found[slot].append(int(tokens[slot]))
            steps[slot] += 1
    assert min(steps) > 20
    assert found == [tokens[:count] for tokens, count in zip(map(alone, range(COUNT)), steps, strict=True)]


def test_only_tokens_of_active_slots_are_seen() -> None:
    """And no token stands for logits that are not finite: token 0 was marked in its place."""
    sampler = mixed([2, 6, 2])
    assert sampler._seen is not None
    before = sampler._seen.clone()
    logits = STREAM[0, [2, 6, 2]].clone()
    logits[2] = math.nan
    tokens = sampler.sample(logits, torch.tensor([False, True, True]))
    before[1, tokens[1]] = True
    assert torch.equal(sampler._seen, before)
    assert not before[2, 0]


def test_some_slots_at_a_time() -> None:
    """Each alone after its prefill, then groups in any order, then all: `sample` and `sample_slots` agree."""
    sampler = mixed(list(range(COUNT)))
    found: list[list[int]] = [[] for _ in range(COUNT)]

    def step(slots: list[int]) -> None:
        logits = torch.stack([STREAM[len(found[slot]), slot] for slot in slots])
        whole = slots == list(range(COUNT))
        tokens = (
            sampler.sample(logits, torch.ones(COUNT, dtype=torch.bool))
            if whole
            else sampler.sample_slots(logits, torch.tensor(slots))
        )
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            found[slot].append(token)

    for slot in range(COUNT):
        step([slot])
    for slots in ([6, 2, 4], [8, 7, 5, 3, 1, 0], list(range(COUNT)), [1, 6], list(range(COUNT))):
        step(slots)
    assert found == [tokens[: len(mine)] for tokens, mine in zip(map(alone, range(COUNT)), found, strict=True)]


def test_a_prefix_of_the_slots() -> None:
    sampler = mixed(list(range(COUNT)))
    tokens = sampler.sample(STREAM[0, :4], torch.ones(4, dtype=torch.bool))
    assert tokens.tolist() == [alone(slot)[0] for slot in range(4)]
    assert sampler.sample(STREAM[0], torch.arange(COUNT) >= 4)[4:].tolist() == [
        alone(slot)[0] for slot in range(4, COUNT)
    ]


def test_greedy_slots_are_exactly_argmax_in_a_mixed_batch() -> None:
    """Ties and all: of equal logits the first."""
    sampler = mixed(list(range(COUNT)))
    ties = torch.randint(4, (20, COUNT, VOCABULARY), generator=torch.Generator().manual_seed(9)).float()
    for logits in (*STREAM, *ties):
        tokens = sampler.sample(logits, torch.ones(COUNT, dtype=torch.bool))
        assert tokens[0] == logits[0].argmax()


def test_more_features_than_needed_change_nothing() -> None:
    """A graph that was captured for more serves less; and what is off for a sequence leaves its logits as they are."""
    for which in range(COUNT):
        sampler = mixed([which, 6])
        active = torch.tensor([True, False])
        batches = [STREAM[step, [which, 6]] for step in range(len(STREAM))]
        assert [int(sampler.sample(batch, active, Features(*[True] * 5))[0]) for batch in batches] == alone(which)


def test_filters_that_are_off_leave_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A top_p of 1 dropped tokens where the probability of the others was rounded up to 1."""
    drawn_from: list[Tensor] = []
    monkeypatch.setattr("fastkv.engine.sampler.draw", lambda logits, u: drawn_from.append(logits) or u.long())
    sampler = mixed([1, 6])
    peaked = STREAM[0, [1, 6]] * 20
    sampler.sample(peaked, torch.tensor([True, True]))
    assert sampler.features == Features(*[True] * 5)
    assert torch.equal(drawn_from[0][0], peaked[0] - peaked[0].max())
    assert drawn_from[0][1].isinf().any()


def test_a_slot_is_used_again() -> None:
    """What one sequence has seen, its settings and its chance end with it, whether it was stopped or not."""
    sampler = mixed([6, 4, 2])
    for step in range(5):
        sampler.sample(STREAM[step, [6, 4, 2]], torch.ones(3, dtype=torch.bool))
    sampler.stop(0)
    for slot, which in enumerate((2, 6, 1)):
        sampler.start(slot, SamplingParams(**SETTINGS[which]), PROMPTS[which : which + 1])
    batches = [STREAM[step, [2, 6, 1]] for step in range(len(STREAM))]
    tokens = torch.stack([sampler.sample(batch, torch.ones(3, dtype=torch.bool)) for batch in batches], dim=1)
    assert tokens.tolist() == [alone(2), alone(6), alone(1)]


def test_features_are_those_of_the_sequences_at_work() -> None:
    sampler = mixed([], n_slots=3)
    assert sampler.features == Features()
    sampler.start(0, SamplingParams(top_k=3, top_p=0.5, min_p=0.5, seed=1), NO_PROMPT)
    assert sampler.features == Features(), "greedy: there is nothing to filter for"
    sampler.start(1, SamplingParams(repetition_penalty=2.0), NO_PROMPT)
    assert sampler.features == Features(repetition_penalty=True)
    sampler.start(2, SamplingParams(temperature=1.0, top_p=0.5, min_p=0.1), NO_PROMPT)
    assert sampler.features == Features(draw=True, repetition_penalty=True, top_p=True, min_p=True)
    sampler.start(2, SamplingParams(temperature=1.0, top_k=3), NO_PROMPT)
    assert sampler.features == Features(draw=True, repetition_penalty=True, top_k=True)
    sampler.stop(1)
    sampler.stop(2)
    assert sampler.features == Features()
    assert hash(sampler.features) == hash(Features())


def test_a_free_slot_is_greedy() -> None:
    sampler = mixed([6, 1])
    sampler.stop(0)
    logits = STREAM[0, [6, 1]]
    for _ in range(20):
        assert sampler.sample(logits, torch.tensor([True, True]))[0] == logits[0].argmax()


def test_no_table_of_seen_tokens_before_a_sequence_needs_it() -> None:
    sampler = mixed([0, 1, 3])
    assert sampler._seen is None
    sampler.start(0, SamplingParams(repetition_penalty=2.0), NO_PROMPT)
    assert sampler._seen is not None


def tensors(sampler: Sampler) -> dict[str, int]:
    return {name: value.data_ptr() for name, value in vars(sampler).items() if isinstance(value, Tensor)}


def test_state_stays_where_it_is() -> None:
    """A captured graph reads the addresses that it saw."""
    sampler = mixed([6], n_slots=COUNT)
    before = tensors(sampler)
    assert len(before) >= 8
    for slot in range(COUNT):
        sampler.start(slot, SamplingParams(**SETTINGS[slot]), PROMPTS[slot])
    sampler.sample(STREAM[0], torch.ones(COUNT, dtype=torch.bool))
    sampler.sample_slots(STREAM[0, :1], torch.tensor([4]))
    sampler.stop(3)
    assert tensors(sampler) == before


class Device(TorchDispatchMode):
    """An error for whatever asks the device for a value, or brings one from the host: both wait for it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "a value is asked for"
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device.type == "meta", f"{function} copies"
        return result


@contextmanager
def no_waiting() -> Iterator[torch.device]:
    """A device without values: what would need one raises."""
    with Device():
        yield torch.device("meta")


def test_the_host_never_waits_for_the_device() -> None:
    with no_waiting() as device:
        sampler = Sampler(COUNT, VOCABULARY, device)
        prompt = torch.zeros(1, 50, dtype=torch.int64, device=device)
        for slot, settings in enumerate(SETTINGS):
            sampler.start(slot, SamplingParams(**settings), prompt)
            logits = torch.zeros(slot + 1, VOCABULARY, device=device)
            sampler.sample(logits, torch.ones(slot + 1, dtype=torch.bool, device=device))
        sampler.sample_slots(logits[:2], torch.zeros(2, dtype=torch.int64, device=device))
        sampler.stop(0)


@pytest.mark.parametrize(
    "wait", [lambda t: t.item(), bool, lambda t: t.tolist(), lambda t: t[t > 0], lambda t: t.cpu()]
)
def test_waiting_would_be_noticed(wait: Any) -> None:
    with no_waiting() as device, pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(torch.zeros(1, device=device))


def test_sampling_leaves_the_logits_alone() -> None:
    sampler, logits = mixed(list(range(COUNT))), STREAM[0].clone()
    sampler.sample(logits, torch.ones(COUNT, dtype=torch.bool))
    assert torch.equal(logits, STREAM[0])


# --- logits that are no numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "where"), [(math.nan, slice(7, 8)), (math.inf, slice(7, 8)), (-math.inf, slice(None))]
)
@pytest.mark.parametrize("slots", [[0], [2], [6], list(range(COUNT))], ids=str)
def test_a_sequence_without_finite_logits_has_no_token(broken: float, where: slice, slots: list[int]) -> None:
    """Greedy, penalised, drawn; the others of the batch have theirs, and the sequence can go through further steps."""
    sampler = mixed(list(range(COUNT)))
    logits = STREAM[0].clone()
    logits[slots, where] = broken
    active = torch.ones(COUNT, dtype=torch.bool)
    tokens = sampler.sample(logits, active).tolist()
    assert tokens == [NOT_FINITE if slot in slots else alone(slot)[0] for slot in range(COUNT)]
    assert (sampler.sample(STREAM[0], active) >= 0).all()


def test_some_infinitely_unlikely_tokens_are_no_fault() -> None:
    sampler = mixed(list(range(COUNT)))
    logits = torch.full((COUNT, VOCABULARY), -math.inf)
    logits[:, 5] = -3.0
    assert sampler.sample(logits, torch.ones(COUNT, dtype=torch.bool)).tolist() == [5] * COUNT


@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.float16, ["float16", "65504", "bfloat16", "float32"]),
        (torch.bfloat16, ["bfloat16", "float32", "checkpoint"]),
        (torch.float32, ["float32", "checkpoint"]),
    ],
)
def test_the_error_for_it_names_the_dtype_and_the_way_out(dtype: torch.dtype, names: list[str]) -> None:
    error = not_finite_error(dtype)
    assert isinstance(error, FaultError)
    assert error.setting == "dtype"
    assert len(str(error).splitlines()) == 1
    assert all(name in str(error) for name in names)
