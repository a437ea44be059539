"""`diffkern bench end-to-end`, as the records before it were made."""

import sys

from diffkern.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "end-to-end", *("--dtype" if a == "--dtypes" else a for a in sys.argv[1:])]))
