"""`python -m diffkern`, and so `torchrun -m diffkern`: the command line."""

from __future__ import annotations

import sys

from diffkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
