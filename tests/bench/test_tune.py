"""`engineroom bench kernels --tune`: a rehearsal, what it leaves out, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton backend needs torch")
pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")

from engineroom.engine.bench.gpu import launches, tune  # noqa: E402
from engineroom.engine.bench.timing import Times  # noqa: E402
from engineroom.engine.cli import main  # noqa: E402
from engineroom.kernels.triton.tuned import UNTUNED, Options, Tuned, parse  # noqa: E402


def rehearse(path: Path, *more: str) -> int:
    return main(["bench", "kernels", "--tune", "--rehearsal", "--output", str(path), *more])


def test_a_rehearsal_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "t.json"
    assert rehearse(path) == 0
    said = capsys.readouterr()
    assert "no time is measured" in said.err and "6 rows" in said.out
    rows = parse(path.read_text(), path.name)[0].rows
    assert {key.weight for key in rows} == {"float16", "NF4"}
    assert {key.tokens for key in rows} == {16, 32, 64, 128}
    (cublas,) = json.loads(path.read_text())["cublas"]
    assert (cublas["rows"], cublas["columns"], cublas["faster_from"]) == (64, 128, None)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 warps take half of the time, and with 3 stages they change a bit."""
    multiply = launches.multiply
    seconds = [1.0]

    def planted(x: Any, weight: Any, out: Any, tuned: Tuned = UNTUNED) -> Any:
        options = next(iter(tuned.rows.values()), Options(4, 1))
        launch = multiply(x, weight, out, tuned=tuned)

        def run() -> None:
            launch()
            seconds[0] = (0.4 if options.num_stages == 3 else 0.5) if options.num_warps == 8 else 1
            if options == (8, 3):
                out[-1, -1] += 1

        return run

    monkeypatch.setattr(launches, "multiply", planted)
    monkeypatch.setattr(tune.Card, "time", lambda *args: Times((seconds[0],) * 3, 0))


def test_the_fastest_that_keeps_the_bits(
    pretended: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    assert rehearse(path, "--format", "NF4", "--shape", "128x64") == 0
    rows = parse(path.read_text(), path.name)[0].rows
    assert set(rows.values()) == {Options(8, 2)}
    assert capsys.readouterr().err.count("other bits than the default") == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tune", "--tokens", "3"], "--tokens is for a run without --tune"),
        (["--rehearsal"], "--rehearsal is for a run with --tune"),
        (["--tune"], "unset it"),
        (["--tune", "--rehearsal", "--format", "X"], "no kernel on the GPU"),
        (["--tune", "--rehearsal", "--format", "Q4_K", "--shape", "32x8"], "do not divide 32"),
    ],
)
def test_what_is_refused(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *flags]) == 2
    assert says in capsys.readouterr().err


def test_without_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--tune"]) == 2
    assert "GPU" in capsys.readouterr().err
