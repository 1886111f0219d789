"""`python -m fastkv` is `fastkv-run`."""

import sys

from fastkv.cli import main

if __name__ == "__main__":
    sys.exit(main())
