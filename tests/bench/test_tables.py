"""What benchmarks write, and how the command answers where it cannot run."""

from __future__ import annotations

import json

import pytest

from engineroom.engine.bench.tables import SCHEMA, Column, Report, Table
from engineroom.engine.bench.timing import FEWEST, measure, percentile
from engineroom.engine.cli import main


def test_a_table_in_its_forms() -> None:
    columns = (Column("name", "name"), Column("us", "us", 1))
    table = Table("Times", columns, [{"name": "a|b", "us": 1234.56}, {"name": "c", "us": None}])
    assert table.markdown().splitlines()[2] == "| a/b  | 1,234.6 |"
    assert table.csv().splitlines()[1] == "a|b,1234.56"
    plain = json.loads(Report("x", {"date": "today"}, [table]).json())
    assert plain["schema"] == SCHEMA and plain["tables"][0]["rows"][0]["us"] == 1234.56


def test_percentiles_and_the_fewest_repetitions() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert len(measure(lambda: 1.0, 0.0, warmup=0).seconds) == FEWEST
    with pytest.raises(ValueError, match="no value"):
        percentile([], 50)


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", "gpu", "--report"]) == 2
    assert "bench gpu:" in capsys.readouterr().err
