"""Every policy on every family: what is computed is what a plain loop computes, whichever way is taken to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("hypothesis")
from fuzz.running_caches import (
    run_batch,
    run_chunks,
    run_continued,
    run_full,
    run_recomputed,
    run_twice,
    run_unbounded,
)
from fuzz.strategies_caches import cases, unknown_settings

from fastkv.cache.catalogue import POLICIES

if TYPE_CHECKING:
    from fuzz.recording import Fuzz


ONE_OF_ALL = 1 / len(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_computed_is_what_was_kept(fuzz: Fuzz, policy: str) -> None:
    fuzz(cases(policy), run_recomputed, ordinary=3, share=0.05 * ONE_OF_ALL)


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_change_nothing_that_is_kept(fuzz: Fuzz, policy: str) -> None:
    fuzz(cases(policy), run_chunks, ordinary=3, share=0.03 * ONE_OF_ALL)


def test_a_budget_of_everything_is_the_full_cache(fuzz: Fuzz) -> None:
    fuzz(cases(), run_unbounded, ordinary=20, share=0.03)


def test_a_sequence_goes_on_from_what_was_kept(fuzz: Fuzz) -> None:
    fuzz(cases(), run_continued, ordinary=25, share=0.03)


def test_a_full_cache_holds_everything(fuzz: Fuzz) -> None:
    fuzz(cases("full"), run_full, ordinary=15, share=0.02)


def test_a_list_is_answered_as_each_prompt_alone(fuzz: Fuzz) -> None:
    fuzz(cases(), run_batch, ordinary=15, share=0.03)


def test_the_same_twice_is_the_same(fuzz: Fuzz) -> None:
    fuzz(cases(), run_twice, ordinary=12, share=0.01)


def test_every_setting_is_drawn() -> None:
    """A new setting of a policy needs a line in strategies_caches.py."""
    assert not unknown_settings()
