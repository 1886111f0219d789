"""Whatever the flags and files of fastkv-run are: it answers, or one line on standard error says what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("hypothesis")
from fuzz.running_command import run_command
from fuzz.strategies_command import commands

if TYPE_CHECKING:
    from fuzz.recording import Fuzz


def test_hostile_flags_and_files_answer_or_are_refused(fuzz: Fuzz) -> None:
    fuzz(commands(), run_command, ordinary=150, share=0.3)
