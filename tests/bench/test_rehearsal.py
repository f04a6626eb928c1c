"""`engineroom bench gpu --rehearsal`: the whole command on the interpreter, and faults it sees."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs torch")
pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")

from engineroom.engine.bench.gpu import checks, engine_rows, launches, law2, report  # noqa: E402
from engineroom.engine.bench.gpu.probe import Probe  # noqa: E402
from engineroom.engine.bench.tables import SCHEMA  # noqa: E402
from engineroom.engine.cli import main  # noqa: E402
from tests.counts import FULL  # noqa: E402


def rehearse(folder: Path, *more: str) -> int:
    return main(["bench", "gpu", "--rehearsal", "--output", str(folder), *more])


# The reduced count: formats of every way to hold codes.
FEW = ("F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K", "INT8", "I4G32", "FP8", "NF4")


def test_a_rehearsal_passes_and_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not FULL:
        few = tuple(fmt for fmt in launches.WEIGHTS if fmt.name in FEW)
        assert len(few) == len(FEW)
        monkeypatch.setattr(launches, "WEIGHTS", few)
    assert rehearse(tmp_path, "--report") == 0
    made = json.loads((tmp_path / "report.json").read_text())
    assert (made["schema"], made["bench"]) == (SCHEMA, "gpu")
    checked, limits, kernels, whole = made["tables"]
    assert all(row["passed"] for row in checked["rows"]) and "0 failed" in checked["note"]
    names = " ".join(row["name"] for row in checked["rows"])
    for fmt in launches.WEIGHTS:
        assert fmt.name == "F32" or fmt.name == "BF16" or f"linear {fmt.name}" in names
    for what in ("int8 cache", "fp8 cache", "by int8", "by fp8", "sampling", "engine,"):
        assert what in names
    for what in ("I4G32, act-order", "act-order by int8", "norms of heads", "norm then add"):
        assert what in names
    # It measures nothing, and says so.
    assert report.REHEARSAL in made["notes"]
    assert all(row["value"] is None for row in limits["rows"])
    assert not any("us" in row or "tok_s" in row for row in kernels["rows"] + whole["rows"])
    said = [row.get("note") or "" for row in kernels["rows"] + whole["rows"]]
    assert not any("Error" in note for note in said), said
    lines = (tmp_path / "report.md").read_text().splitlines()
    for table in made["tables"]:
        at = lines.index(f"## {table['title']}") + 2
        grid = lines[at : at + 2 + len(table["rows"])]
        assert {line.count("|") for line in grid} == {len(table["columns"]) + 1}
    assert "checks passed, 0 failed" in capsys.readouterr().out


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels' checks, and none of law 2: a rehearsal of a second."""
    every = checks.probes

    def some(*args: object) -> list[Probe]:
        return [p for p in every(*args) if p.name in ("linear Q4_0", "rms_norm")]  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "probes", some)
    monkeypatch.setattr(law2, "probes", lambda *args: [])
    monkeypatch.setattr(engine_rows, "probes", lambda *args: [])


@pytest.mark.parametrize("fault", ["none", "a wrong element", "a row beside the output", "a raise"])
def test_a_planted_fault_is_caught(
    fault: str,
    few_checks: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    launch = launches.rms_norm.launch

    def faulty(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *more: float) -> None:
        if fault == "a raise":
            raise RuntimeError("out of shared memory")
        launch(x, weight, out, *more)
        if fault == "a wrong element":
            out[-1, -1] *= 1.01
        elif fault == "a row beside the output":
            rows, width = out.shape
            out.as_strided((rows + 1, width), out.stride())[rows] = 0

    monkeypatch.setattr(launches, "rms_norm", SimpleNamespace(launch=faulty))
    status = rehearse(tmp_path / "not made")
    said = capsys.readouterr().out
    assert status == (0 if fault == "none" else 1)
    assert ("FAILED correct: rms_norm" in said) == (fault != "none")
    assert "linear" not in said.replace("checks passed", "")
    assert not (tmp_path / "not made").exists()  # only --report writes


def test_neighbours_that_change_a_row_are_caught() -> None:
    bits = np.array([1.0, -0.0, np.nan], np.float32)
    one = torch.from_numpy(bits)
    assert law2.same_bits(one, one.clone())
    assert not law2.same_bits(one, torch.tensor([1.0, 0.0, np.nan]))
