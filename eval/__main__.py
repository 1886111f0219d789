"""`python -m fastkv.eval`: the command fastkv-eval."""

from __future__ import annotations

import sys

from fastkv.eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
