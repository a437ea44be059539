"""Writes the figures of the README, in docs/figures.md and in the pictures there, from the committed records."""

import sys

from diffkern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "report", *sys.argv[1:], "--readme", "README.md"]))
