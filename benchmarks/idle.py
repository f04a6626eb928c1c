"""What a server costs that nobody asks anything of: processor time of all its processes.

`python benchmarks/idle.py [--model smollm2] [--seconds 60]` serves a model, waits until it is ready
and its start is over, and reads /proc; 1 where it is half a percent of a core or more.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from served import family, serving

PORT = 8145
_SETTLE = 10.0  # seconds after the start
_LIMIT = 0.5  # percent of a core


def used(pid: int) -> tuple[float, int]:
    """Seconds of processor time, and how often it was woken."""
    seconds, wakes = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        wakes += int(status["voluntary_ctxt_switches"])
    return seconds, wakes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with serving(args.model, PORT) as server:
        time.sleep(_SETTLE)
        processes = family(server)
        before = [used(pid) for pid in processes]
        time.sleep(args.seconds)
        after = [used(pid) for pid in processes]
    total = 0.0
    for pid, (s0, w0), (s1, w1) in zip(processes, before, after, strict=True):
        percent = 100 * (s1 - s0) / args.seconds
        total += percent
        name = "server" if pid == server else "below it"
        print(
            f"{name}: {percent:.3f}% of a core, woken {(w1 - w0) / args.seconds:.1f} times a second"
        )
    print(f"together {total:.3f}%")
    return 0 if total < _LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
