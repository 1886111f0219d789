"""An answer's text is what its tokens decode to, less what ended it, whatever the sampling and the stop strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("hypothesis")
from fuzz.running_text import run_answer, run_call
from fuzz.strategies_text import answers, calls

if TYPE_CHECKING:
    from fuzz.recording import Fuzz


def test_a_text_is_what_its_tokens_decode_to(fuzz: Fuzz) -> None:
    fuzz(answers(), run_answer, ordinary=25, share=0.06)


def test_calls_of_any_kind_answer_or_are_refused(fuzz: Fuzz) -> None:
    fuzz(calls(), run_call, ordinary=80, share=0.04)
