"""A run that dies anywhere and is started again ends with the same bytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.batch import BatchError, Limits, verify
from engineroom.engine.batch.journal import journal_path
from tests.batch.child import BatchFake, run, write_lines
from tests.counts import count

CHILD = Path(__file__).with_name("child.py")
REQUESTS = 40


def child(source: Path, output: Path, **task: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, CHILD, json.dumps({"input": str(source), "output": str(output), **task})],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("batch") / "in.jsonl", REQUESTS)


@pytest.fixture(scope="module")
def expected(source: Path) -> bytes:
    output = source.with_name("out.jsonl")
    run(source, output)
    ids = [json.loads(line)["custom_id"] for line in output.read_bytes().splitlines()]
    assert ids == [f"r{number}" for number in range(REQUESTS)]
    return output.read_bytes()


def _point(rng: random.Random) -> dict[str, Any]:
    match rng.randrange(5):
        case 0 | 1:
            return {"step": rng.randrange(12)}
        case 2 | 3:
            return {"write": rng.randrange(5), "share": rng.random()}
        case _:
            return {"line": rng.randrange(REQUESTS)}


@pytest.fixture(scope="module")
def expected_table(source: Path) -> bytes:
    output = source.with_name("out.parquet")
    run(source, output)
    return output.read_bytes()


@pytest.mark.parametrize("chain", range(count(reduced=5, full=25)))
def test_killed_and_started_again(
    chain: int, source: Path, expected: bytes, expected_table: bytes, tmp_path: Path
) -> None:
    """Killed at random points, several times over the same batch; every other output a table."""
    output = tmp_path / ("out.parquet" if chain % 2 else "out.jsonl")
    expected = expected_table if chain % 2 else expected
    rng = random.Random(chain)
    kills = 0
    for _ in range(4):
        done = child(source, output, **_point(rng))
        assert done.returncode in (0, -9), done.stderr
        kills += done.returncode == -9
    assert kills
    engine = BatchFake()
    summary = run(source, output, engine)
    assert len(engine.asked) == summary.done == REQUESTS - summary.done_before
    assert output.read_bytes() == expected
    assert verify(output).complete


def test_what_was_synced_is_not_done_twice(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert child(source, output, write=4, share=0.5).returncode == -9
    engine = BatchFake()
    summary = run(source, output, engine)
    assert summary.done_before >= 15  # three groups of five went before the torn one
    assert len(engine.asked) == REQUESTS - summary.done_before
    assert output.read_bytes() == expected


def test_a_full_disk(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done = child(source, output, limit=9000)
    assert done.returncode == 10, done.stderr
    assert done.stdout.startswith("E-BATCH-05")
    assert not output.exists()
    assert run(source, output).done_before > 5
    assert output.read_bytes() == expected


def test_a_clock_that_jumps_changes_nothing(
    source: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's clock, back by years and forth; a deadline that is a duration reads another."""
    rng = random.Random(5)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(-1e9, 4e9))
    monkeypatch.setattr(time, "time_ns", lambda: rng.randrange(1 << 61))
    output = tmp_path / "out.jsonl"
    engine = BatchFake()
    engine.on_step = lambda number: engine.fail() if number == 6 else None
    limits = Limits(deadline="1h")
    with pytest.raises(ZeroDivisionError):
        run(source, output, engine, limits=limits)
    assert run(source, output, limits=limits).done_before > 5
    assert output.read_bytes() == expected


def test_a_second_run_at_the_same_time_is_refused(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    engine = BatchFake()

    def also(number: int) -> None:
        if number == 2:
            with pytest.raises(BatchError, match="another run") as caught:
                run(source, output)
            assert caught.value.code == "E-BATCH-05"

    engine.on_step = also
    run(source, output, engine)
    assert engine.steps > 2


def test_a_finished_batch_is_not_run_again(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(source, output)
    output.unlink()  # written anew from the journal
    engine = BatchFake()
    assert run(source, output, engine).done == 0
    assert not engine.asked
    assert output.read_bytes() == expected
    run(source, output, engine, restart=True)
    assert len(engine.asked) == REQUESTS
    assert output.read_bytes() == expected


def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the lines take no more than their index, and the engine is never flooded."""
    peaks = []
    most = count(reduced=20_000, full=100_000)
    for lines in (most // 10, most):
        source = write_lines(tmp_path / f"{lines}.jsonl", lines, tokens=1)
        done = child(source, tmp_path / f"{lines}.out")
        assert done.returncode == 0, done.stderr
        kib, live = map(int, done.stdout.split())
        assert live <= 8
        peaks.append(kib << 10)
    assert peaks[1] - peaks[0] < 3 * 2**20 + 60 * most


def test_the_journal_of_a_crash_is_named(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert child(source, output, step=6).returncode == -9
    found = verify(output)
    assert not found.complete
    assert journal_path(output).exists()
