"""Where tests find what the repository holds, and what may lie beside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE_MODELS = Path(os.environ.get("FASTKV_TEST_MODELS", ROOT.parent / "shared" / "models"))
