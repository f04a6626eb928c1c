"""A deadline and a budget: the run stops, nothing is lost, and the same command goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from engineroom.engine import cli
from engineroom.engine.batch import BatchError, Limits, manifest, status
from engineroom.engine.core.cost import Cost
from engineroom.engine.tools import session
from tests.batch.child import MODEL, BatchFake, run, write_lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", 40)


def priced(money: float | None = 0.25) -> BatchFake:
    engine = BatchFake()
    engine.costs = lambda: Cost(2.0, money, 0.5, True)
    return engine


def stopped(source: Path, output: Path, engine: BatchFake, limits: Limits) -> str:
    with pytest.raises(BatchError) as caught:
        run(source, output, engine, limits=limits)
    assert caught.value.code == "E-BATCH-07"
    assert not engine.num_live and not output.exists()
    return str(caught.value)


def test_a_budget_is_not_exceeded_and_counts_earlier_runs(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    message = stopped(source, output, priced(), Limits(max_cost=3.0))
    assert "has cost 3 and another request would exceed max_cost=3" in message
    assert status(output).done == 12
    again = priced()
    stopped(source, output, again, Limits(max_cost=3.1))
    assert not again.asked
    stopped(source, output, again, Limits(max_cost=5.0))
    assert len(again.asked) == 8
    summary = run(source, output, priced(), limits=Limits(max_cost=10.0))
    assert summary.money == 10.0 and summary.done == 20
    expected = tmp_path / "expected.jsonl"
    run(source, expected)
    assert output.read_bytes() == expected.read_bytes()


def test_a_budget_without_prices_is_refused(source: Path, tmp_path: Path) -> None:
    for engine in (BatchFake(), priced(None)):
        with pytest.raises(BatchError, match="counts no money") as caught:
            run(source, tmp_path / "out.jsonl", engine, limits=Limits(max_cost=1.0), restart=True)
        assert caught.value.code == "E-BATCH-06"


def test_a_deadline_stops_what_runs_and_the_rest_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    engine = BatchFake()
    engine.on_step = lambda number: now.__setitem__(0, 100.0 + 10 * number)
    output = tmp_path / "out.jsonl"
    assert "(1m5s) has passed" in stopped(source, output, engine, Limits(deadline="1m5s"))
    assert engine.steps == 7
    engine.step()  # what was aborted comes out
    before = status(output).done
    assert 0 < before < 40
    monkeypatch.undo()
    assert run(source, output, limits=Limits(deadline="1d2h")).done == 40 - before


def test_a_deadline_may_be_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(deadline="2026-11-30T08:00:00+01:00")
    monkeypatch.setattr(time, "time", lambda: 1796022000.0 - 1)
    limits.check_time()
    monkeypatch.setattr(time, "time", lambda: 1796022000.0)
    stopped(source, tmp_path / "o", BatchFake(), limits)


@pytest.mark.parametrize("deadline", ["", "soon", "5", "-1h", "1h 2m", "2026-13-01"])
def test_a_deadline_that_is_none(deadline: str) -> None:
    with pytest.raises(BatchError, match="neither a duration"):
        Limits(deadline=deadline)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none(cost: float) -> None:
    with pytest.raises(BatchError, match="no amount of money"):
        Limits(max_cost=cost)


def test_the_summary_has_energy_and_money(source: Path, tmp_path: Path) -> None:
    summary = run(source, tmp_path / "out.jsonl", priced())
    assert summary.cost == Cost(80.0, 10.0, 20.0, True)
    tokens = summary.prompt_tokens + summary.completion_tokens
    assert summary.tokens_per_joule == tokens / 80.0
    assert f"energy {summary.cost}, {tokens / 80.0:.2f} tokens per joule" in str(summary)
    assert summary.as_plain()["cost"]["grams"] == 20.0


def test_the_command_says_so_by_its_status(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "open_engine", lambda config: priced())
    monkeypatch.setattr(manifest, "engine_facts", lambda engine: MODEL)
    output = str(tmp_path / "out.jsonl")
    command = ["batch", "run", str(source), "-o", output]
    assert cli.main([*command, "--max-cost", "2"]) == 12
    assert "E-BATCH-07" in capsys.readouterr().err
    assert cli.main([*command, "--deadline", "0s"]) == 12
    assert cli.main([*command, "--deadline", "never"]) == 2
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 8
