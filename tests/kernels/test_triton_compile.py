"""Every shipped configuration of the Triton kernels, compiled ahead of time: no GPU is needed.

In a process of its own, without the interpreter that the other tests run kernels on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.counts import FULL
from tests.house.tree import ROOT

pytest.importorskip("torch", reason="the Triton backend needs torch")
pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")

from tests.kernels.triton_compile import SHARED_LIMIT, TARGETS, page

# The reduced count: one of each kind that a change is likely to break.
REDUCED = (
    "attention walk bfloat16 32/8x128 page 16 ",
    "attention split bfloat16 32/8x128 page 16 ",
    "linear bfloat16 tokens 16 K 4096",
    "linear Q4_0 bfloat16 tokens 16 K 4096",
    "sampling draw",
    "sampling filter",
)


def compile_all(targets: list[str], *only: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton_compile", "--targets", *targets]
    done = subprocess.run(
        [*command, *(("--only", *only) if only else ())],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(1800)
def test_what_is_shipped_compiles_to_what_it_was_chosen_for() -> None:
    rows = compile_all(list(TARGETS)) if FULL else compile_all(["sm_90"], *REDUCED)
    assert len(rows) >= (250 if FULL else 4)
    for row in rows:
        assert "error" not in row, row
        assert row["shared"] <= SHARED_LIMIT[row["target"]], row
        assert row["stack"] == 0, row
        assert all(row[name] > 0 for name in row["expects"]), row
        assert not any(row.get(name, 0) for name in row["without"]), row
    orders: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["name"].startswith(("attention walk", "attention split")):
            layer = re.sub(r"walk|split|rows \d+", "", row["name"])
            assert len(row["sums"]) == 1, row
            assert orders.setdefault((layer, row["target"]), row["sums"]) == row["sums"], row
    assert orders
    if FULL:
        assert (ROOT / "docs" / "kernels.md").read_text("utf-8") == page(rows), (
            "write it again: python -m tests.kernels.triton_compile --write"
        )


def test_every_launch_of_a_program_compiles_and_none_for_a_number_of_tokens() -> None:
    """With the launchers' own arguments, as on a card; nothing is run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_launches"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = ["rows", "map", "rms_norm", "float", "rope", "walk", "split", "merge"]
    assert set(after[-1]) == {f"{name}_kernel" for name in kernels}
    # Widths of tiles were all met by the fourth step: another number of tokens is nothing new.
    assert after[-1] == after[-2]
    assert after[-1]["walk_kernel"] == 2
    assert after[-1]["rms_norm_kernel"] == 1
