"""`engineroom bench kernels`: rows of tiny shapes, and what a row may claim."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from engineroom.engine.bench import kernels, limits
from engineroom.engine.bench.kernels import Limits, Work, figures
from engineroom.engine.bench.timing import Times
from engineroom.engine.cli import main

LIMITS = Limits(read=1e9, int8=2e9, bf16=0.0, f32=1e9)


def row(seconds: float, num_bytes: int, operations: int, dots: str = "int8") -> dict:  # type: ignore[type-arg]
    work = Work(
        "x", "Q4_0", (1, 32, 32), num_bytes, operations, dots, lambda allowance: Times((), 0)
    )
    return figures(work, Times((seconds,) * 3, 2), LIMITS)


def test_the_limit_is_the_one_that_takes_longer() -> None:
    reads, multiplies = row(2.0, 10**9, 10**9), row(2.0, 10**8, 3 * 10**9)
    assert (reads["limit"], reads["share"]) == ("read", 50.0)
    assert (multiplies["limit"], multiplies["share"]) == ("int8", 75.0)
    assert "limit" not in row(1.0, 0, 0)  # from the caches
    assert row(1.0, 10**8, 10**12, "bf16")["limit"] == "read"  # no known peak


def test_no_cell_says_what_cannot_be() -> None:
    above = row(0.5, 10**9, 1)
    assert "share" not in above and "200% of read" in above["note"]
    nothing = row(0.0, 10**9, 1)
    assert not {"median_us", "gbs", "gops", "share"} & nothing.keys() and nothing["note"]


def test_bf16_is_counted_as_it_is_packed() -> None:
    weight = kernels.random_weight("BF16", 64, 256)
    full = kernels.packed_row_bytes(weight, compact=False)
    assert full >= 2 * 256
    assert kernels.packed_row_bytes(weight, compact=True) < 0.9 * full


def test_tiny_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HEADS", (4, 2, 16))
    path = tmp_path / "k.json"
    kernels.run(
        minutes=0.001,
        threads=1,
        shapes=[(256, 64)],
        tokens=[1, 8],
        formats=kernels.FORMATS_TIMED,
        paths={"json": str(path)},
        contexts=[64],
        cold=1 << 16,
        say=io.StringIO(),
    )
    limits, table = json.loads(path.read_text())["tables"]
    assert limits["rows"][0]["value"] > 0
    done = [(r["operation"], r["format"], r["M"]) for r in table["rows"]]
    assert len(done) == len(set(done)) == 2 * len(kernels.FORMATS_TIMED) + 2 + 4
    assert {r["operation"] for r in table["rows"] if "limit" not in r and "gbs" not in r} >= {
        "rms_norm"
    }


def test_an_unknown_format_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--format", "Q9"]) == 2
    said = capsys.readouterr().err
    assert "Q9" in said and all(name in said for name in kernels.FORMATS_TIMED)


def test_what_goes_round_is_more_than_the_last_cache(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    size = tmp_path / "size"
    size.write_text("65536K\n")
    monkeypatch.setattr(limits, "_LAST_CACHE", size)
    assert limits.cold_bytes() == 256 << 20
    monkeypatch.setattr(limits, "_LAST_CACHE", tmp_path / "none")
    assert limits.cold_bytes() == 128 << 20
