"""The families of `fastkv-eval turns`, by the name that `--task` takes. A new family is a new file here."""

from __future__ import annotations

from fastkv.eval.turns import archive, key_value, many_shot, math_find, mixed, prefix_suffix, variables
from fastkv.eval.turns.talk import Family

_FILES = (key_value, prefix_suffix, variables, math_find, many_shot, mixed, archive)
FAMILIES: dict[str, Family] = {file.FAMILY.name: file.FAMILY for file in _FILES}
