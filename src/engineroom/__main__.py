"""`python -m engineroom`: the same command as the console script."""

import sys

from engineroom.engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
