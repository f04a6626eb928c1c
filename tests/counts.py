"""How many cases a randomised test runs: reduced in `make test`, full in `make test-all`."""

import os

FULL = os.environ.get("ENGINEROOM_TEST_FULL", "") == "1"


def count(*, reduced: int, full: int) -> int:
    """`full` under `make test-all` (ENGINEROOM_TEST_FULL=1), else `reduced`."""
    return full if FULL else reduced
