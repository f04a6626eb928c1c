"""`engineroom bench latency`, `throughput` and `startup`: their arithmetic, and a tiny model."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine.bench import energy, latency, startup, throughput
from engineroom.engine.bench.bound import Bound, share
from engineroom.engine.bench.cost import ModelCost
from engineroom.engine.bench.model import Subject, arrivals, rounds
from engineroom.engine.bench.timing import Repeats
from engineroom.engine.cli import main
from engineroom.engine.config import EngineConfig
from engineroom.engine.core.cost import Cost
from engineroom.engine.engine import Engine
from engineroom.engine.tools.options import add_engine_flags, engine_arguments, engine_config
from tests.engine import golden

FEW = ("--warmup", "1", "--repetitions", "2", "--threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write(tmp_path_factory.mktemp("golden"))


def rows(folder: Path, *argv: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts and rows of a benchmark that ran well, and its other files are there."""
    made = {kind: folder / f"made.{kind}" for kind in ("json", "csv", "md")}
    files = [part for kind, path in made.items() for part in (f"--{kind}", str(path))]
    assert main(["bench", *argv, *files]) == 0
    report = json.loads(made["json"].read_text())
    (table,) = report["tables"]
    assert made["csv"].read_text().splitlines()[0] == ",".join(table["columns"])
    assert len(made["md"].read_text().splitlines()) > len(table["rows"])
    return report["facts"], table["rows"]


def test_figures_of_one_stream() -> None:
    cells = latency.figures([[0.5, 0.6, 0.8], [0.7, 0.8, 1.0]])
    assert cells["first_median_ms"] == pytest.approx(600)
    assert cells["between_median_ms"] == pytest.approx(150)
    assert cells["between_p99_ms"] == pytest.approx(200)
    assert cells["whole_median_ms"] == pytest.approx(900)
    assert "between_median_ms" not in latency.figures([[0.5], [0.7]])


def test_figures_of_many_requests() -> None:
    cells = throughput.figures([[1.0, 2.0], [4.0, 3.0], [1.0, 1.0]], input_len=10, output_len=30)
    assert cells["requests_s"] == 1.0  # two in the round of median length, 2 s
    assert (cells["input_tokens_s"], cells["output_tokens_s"]) == (10.0, 30.0)
    assert cells["total_tokens_s"] == 40.0
    assert cells["whole_median_ms"] == 1500.0


# 60 MB of weights; 12 MOP a token, 1 MOP a head; 2 KB of keys and values, 1 kOP a key, two layers.
COST = ModelCost(60_000_000, 2_000, 12_000_000, 1_000_000, 1_000, (0, 100), "int8_gops")
RATES = {"read_gbs": 30.0, "int8_gops": 1000.0, "bf16_gflops": 500.0, "f32_gflops": 100.0}


def test_the_least_that_requests_at_once_can_take() -> None:
    prompts = 2 * (400 * 12e6 + 1e6) / 1e12 + 2 * (80_200 + 35_050) * 1e3 / 5e11
    step = (60e6 + 2 * (450 + 100) * 2e3) / 30e9  # bytes bound it
    assert COST.decode_s(2, 450, RATES) == pytest.approx(step)
    assert COST.run_s(2, 400, 100, RATES) == pytest.approx(prompts + 99 * step)
    assert COST.run_s(2, 400, 100, {**RATES, "int8_gops": 0.0}) is None  # no such instruction


def test_shares_are_of_what_was_measured() -> None:
    assert share("a", 0.010, 20.0) == {"a": pytest.approx(50)}
    assert share("a", None, 20.0) == share("a", 0.010, None) == {}


@pytest.mark.cores  # it measures the machine
def test_a_model_s_cost_is_counted_from_its_program(model: Path) -> None:
    engine = Engine.from_model(str(model), EngineConfig(model=str(model), threads=1))
    try:
        cost, config = ModelCost.of_engine(engine), engine.model_config
        assert cost is not None
        head = 2 * config.vocab_size * config.hidden_size
        assert cost.head_ops == head
        assert cost.windows == config.windows and cost.products in RATES
        heads = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        ffn = 3 * config.intermediate_size * config.hidden_size
        layer = config.hidden_size * (2 * heads + 2 * kv) + ffn
        assert cost.linear_ops == 2 * config.num_layers * layer
        bound = Bound(engine)
        assert (bound.prompt_s(64) or 0) > (bound.prompt_s(1) or 0) > 0
        assert (bound.run_s(2, 8, 8) or 0) > (bound.decode_s(2, 8) or 0) > 0
    finally:
        engine.close()


def test_figures_of_energy() -> None:
    found = [[Cost(j, None, None, True)] * 2 for j in (3.0, 1.0, 2.0)]
    cells = energy.figures(found, 30, alone=8.0)
    assert (cells["joules_request"], cells["tokens_joule"], cells["cost_alone"]) == (
        2.0,
        15.0,
        0.25,
    )
    assert cells["estimated"] is True


def test_energy_of_a_model(model: Path, tmp_path: Path) -> None:
    sizes = ("--requests", "4,1", "--input-len", "5", "--output-len", "9")
    facts, (one, four) = rows(tmp_path, "energy", str(model), *sizes, *FEW)
    assert (one["batch"], four["batch"], one["cost_alone"]) == (1, 4, 1.0)
    assert four["cost_alone"] == pytest.approx(four["joules_request"] / one["joules_request"])
    assert facts["backend"]["meter"]


def test_every_token_is_seen_when_it_comes(model: Path) -> None:
    engine = Engine.from_model(str(model), EngineConfig(model=str(model), threads=1))
    try:
        rng = np.random.default_rng(3)
        for streamed in (True, False):
            streams = arrivals(engine, rng, 3, 5, 40, streamed=streamed)
            assert [len(stream) for stream in streams] == [40] * 3
            for stream in streams:
                assert stream == sorted(stream) and stream[0] > 0
                assert len(set(stream)) == (40 if streamed else 1)
    finally:
        engine.close()


def test_rounds_that_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert rounds("x", Repeats(2, 3), partial(next, iter(range(9)))) == [2, 3, 4]
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "x: 1 of 5" in said and "x: 5 of 5" in said


def test_latency(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--input-len", "4,20", "--output-len", "1,3")
    facts, table = rows(tmp_path, "latency", str(model), *lengths, *FEW)
    assert [(r["input_len"], r["output_len"]) for r in table] == [(4, 1), (4, 3), (20, 1), (20, 3)]
    for row in table:
        assert (row["batch"], row["warmup"], row["repetitions"]) == (1, 1, 2)
        assert row["format"] == "F32" and row["model"]
        assert 0 < row["first_median_ms"] <= row["whole_median_ms"] <= row["whole_p99_ms"]
        assert ("between_p99_ms" in row) == (row["output_len"] > 1)
    assert facts["options"] == {
        "enable_prefix_caching": False,
        "max_model_len": 23,
        "max_num_seqs": 1,
        "threads": 1,
    }
    said = capsys.readouterr()
    assert said.out.count("| F32") == 4 and not said.err


def test_throughput(model: Path, tmp_path: Path) -> None:
    sizes = ("--requests", "2,5", "--input-len", "8", "--output-len", "4", "--quantization", "int8")
    facts, table = rows(tmp_path, "throughput", str(model), *sizes, *FEW)
    assert [(r["batch"], r["format"]) for r in table] == [(2, "int8"), (5, "int8")]
    for row in table:
        assert row["input_tokens_s"] == pytest.approx(8 * row["requests_s"])
        assert row["total_tokens_s"] == pytest.approx(12 * row["requests_s"])
        assert 0 < row["whole_median_ms"] <= row["whole_p99_ms"]
    assert facts["options"]["max_num_seqs"] == 5 and facts["backend"]["backend"] == "cpu"


def test_startup(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def recorded(command: list[str], *, cold: bool) -> float:
        starts.append(cold)
        return first_token(command, cold=cold)

    first_token = startup.first_token
    monkeypatch.setattr(startup, "first_token", recorded)
    once = ("--warmup", "0", "--repetitions", "1", "--threads", "1")
    _, table = rows(tmp_path, "startup", str(model), *once)
    compiled, cold = table
    assert (compiled["modules"], cold["modules"]) == ("compiled", "cold")
    assert compiled["input_len"] > 0 and compiled["output_len"] == 1
    assert compiled["first_median_ms"] > 0 and cold["first_median_ms"] > 0
    assert starts == [False, True]


def test_a_cold_start_finds_no_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    code = (
        "import os, sys, importlib.util as u; there = u.find_spec('argparse').cached; "
        "sys.exit(not there.startswith(sys.pycache_prefix or '-') or os.path.exists(there))"
    )
    bare = [sys.executable, "-S", "-c", code]
    startup.first_token(bare, cold=True)
    with pytest.raises(subprocess.CalledProcessError):
        startup.first_token(bare, cold=False)


def test_a_process_that_fails_says_why(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "no folder" / "steps"
    assert main(["bench", "startup", str(model), "--step-log", str(log)]) != 0
    said = capfd.readouterr()
    assert "no folder" in said.err and not said.out


def test_the_process_is_given_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    config = EngineConfig(
        model="m", threads=3, enable_prefix_caching=False, packed_cache=True, memory_budget="1GiB"
    )
    arguments = engine_arguments(config)
    assert arguments and engine_config(parser.parse_args(arguments), "m") == config
    assert set(arguments) < set(startup.command(config))


def test_a_format_is_most_of_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = [{"format": "Q4_K", "bytes": 900}, {"format": "Q6_K", "bytes": 95}]
    report = {"name": "m", "backend": "cpu", "quantization": None}
    report |= {"formats": [*formats, {"format": "F32", "bytes": 5}]}
    monkeypatch.setattr("engineroom.engine.bench.model.inspect_model", lambda config: report)
    assert Subject.of(EngineConfig(model="m")).format == "Q4_K+Q6_K"


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["latency", "m", "--input-len", "4,x"], "'x' is not a whole number"),
        (["throughput", "m", "--repetitions", "0"], "'0' is not a whole number"),
        (["startup", "m", "--output-len", "4"], "--output-len"),
        (["latency"], "model"),
    ],
)
def test_usage_errors(argv: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert why in capsys.readouterr().err
