"""Whatever a model folder holds: it loads and answers, or one line says what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip("hypothesis")
from fuzz.running_folders import run_folder
from fuzz.strategies_folders import EDITS, folders

if TYPE_CHECKING:
    from fuzz.recording import Fuzz


@pytest.mark.parametrize("what", EDITS)
def test_a_hostile_folder_answers_or_is_refused(fuzz: Fuzz, what: str) -> None:
    fuzz(folders(what), run_folder, ordinary=20, share=0.06)
