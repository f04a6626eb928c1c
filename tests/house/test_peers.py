"""The benchmark beside peers: its report and plot from a canned result, and workers that fail."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import kl, plot, prepare, probe, report, run, scaling
from benchmarks.peers.engines import table
from benchmarks.peers.places import WORKERS, NotPrepared, Places
from benchmarks.peers.worker import Refused, Worker, WorkerFailed
from engineroom.engine.bench.cost import ModelCost


def row(entry: str, workload: str, round_: int, mode: str = "near", **values: float) -> Any:
    moment = {
        "barrier_ns": 40.0,
        "read_gbs": 33.0,
        "int8_gops": 900.0,
        "bf16_gflops": 450.0,
        "mode": mode,
    }
    return {
        "entry": entry,
        "workload": workload,
        "round": round_,
        "values": values,
        "probe": moment,
    }


# 66 MB of weights are 2 ms at the 33 GB/s of the rows above, 512 x 9 MOP 5.12 ms at 900 GOP/s.
COST = ModelCost(66_000_000, 0, 9_000_000, 0, 0, (0, 4), "int8_gops")


def canned() -> dict[str, Any]:
    names = ["engineroom Q8_0", "llama.cpp Q8_0", "OpenVINO GenAI int8"]
    rates = {names[0]: (300, 200, 250), names[1]: (100, 120, 110), names[2]: (120, 130, 125)}
    firsts = {names[0]: (0.5, 0.4, 0.6), names[1]: (1.0, 0.8, 0.9)}
    rows = [
        row(name, "decode", i, "far" if i == 2 else "near", rate=float(value))
        for name, values in rates.items()
        for i, value in enumerate(values)
    ]
    rows += [
        row(name, "prompt", i, first=value)
        for name, values in firsts.items()
        for i, value in enumerate(values)
    ]
    failed = row(names[2], "prompt", 0)
    del failed["values"]
    failed["error"] = "no answer in 9 s; its last lines:\n  | <boom> & bust"
    chosen = [w for w in run.workloads(run.Sizes()) if w.name in ("decode", "prompt")]
    return {
        "schema": run.SCHEMA,
        "machine": "A <fast> & quiet machine, 2 cores, Linux",
        "date": "2026-01-02 03:04 UTC",
        "command": "python -m benchmarks.peers run",
        "python": "3.11.7",
        "threads": 2,
        "workloads": [
            {"name": w.name, "title": w.title, "metrics": [list(m) for m in w.metrics]}
            for w in chosen
        ],
        "entries": [
            {"name": n, "engine": n.rsplit(" ", 1)[0], "kind": "8bit", "format": ""} for n in names
        ],
        "minutes": 2.4,
        "patience": 15.0,
        "sizes": dataclasses.asdict(run.Sizes()),
        "left_out": {"engineroom int4": "engineroom int4: not available: quantization='int4'"},
        "costs": {names[0]: dataclasses.asdict(COST)},
        "versions": {names[0]: "0.1.0", names[1]: "0.3.36"},
        "types": {"Q8_0": {"tensors": {}, "embedding": "Q8_0", "head": "tied to the embedding"}},
        "kl": {names[0]: {"kl": 0.01234, "top1": 0.9}, names[2]: {"why": "it gives none"}},
        "rows": [*rows, failed],
    }


# -------------------------------------------------------------------------------------- report


def lines_of(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_medians_ranges_and_ratios() -> None:
    text = report.markdown(canned())
    (ours,) = lines_of(text, "| one stream", "**engineroom Q8_0**")
    assert "| 250 | 200 .. 300 | 2.00 of OpenVINO GenAI int8; 2.27 of llama.cpp Q8_0 |" in ours
    assert ours.endswith("| 50% | far 1, near 2 | 0.0123 |")  # 2 of the 4 ms that a token took
    (peer,) = lines_of(text, "| one stream", "OpenVINO GenAI int8", "best peer |")
    assert "| 125 | 120 .. 130 |" in peer
    assert peer.endswith("| n/a |")
    (other,) = lines_of(text, "| one stream", "| llama.cpp Q8_0")
    assert "best peer" not in other
    # Less is better: half the time is twice as good.
    (ours,) = lines_of(text, "| prompt of 512", "**engineroom Q8_0**")
    assert "| 0.50 | 0.40 .. 0.60 | 1.80 of llama.cpp Q8_0 | 1% |" in ours  # 5.12 of 500 ms


def test_the_header_names_the_machine_the_date_the_command_and_the_versions() -> None:
    text = report.header(canned())
    for part in ("2 cores", "2026-01-02", "`python -m benchmarks.peers run`", "llama.cpp 0.3.36"):
        assert part in text
    assert "40 .. 40 ns barrier" in text
    assert "450 .. 450 bf16 GFLOP/s" in text
    result = canned()
    for measured in result["rows"]:
        measured["probe"]["bf16_gflops"] = None
    assert "bf16" not in report.header(result)  # no probe had the instruction
    assert "Q8_0: embedding Q8_0" in text


def test_what_failed_and_what_is_missing_is_said() -> None:
    text = report.markdown(canned())
    assert lines_of(text, "| OpenVINO GenAI int8 | failed |")
    assert "* OpenVINO GenAI int8, prompt, round 1: no answer in 9 s" in text
    assert "* OpenVINO GenAI int8: it gives none" in text
    assert "* engineroom int4: not available: quantization='int4'" in text
    result = canned()
    result["rows"] = [r for r in result["rows"] if r["entry"].startswith("engineroom")]
    alone = report.markdown(result)
    (ours,) = lines_of(alone, "| one stream", "**engineroom Q8_0**")
    assert "| 250 | 200 .. 300 |  | 50% | far" in ours  # no peer: no ratio
    assert "llama.cpp Q8_0 |" not in alone


def test_results_join_as_rounds_and_refuse_what_does_not_fit(tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    one.write_text(json.dumps(canned()))
    later = canned()
    later["rows"] = [row("engineroom Q8_0", "decode", 0, rate=1000.0)] * 4
    two.write_text(json.dumps(later))
    assert "| 1000 | 200 .. 1000 |" in report.markdown(report.load([one, two]))
    later["machine"] = "another"
    two.write_text(json.dumps(later))
    with pytest.raises(report.BadReport, match="another machine"):
        report.load([one, two])
    quick = canned()
    quick["workloads"][0]["title"] = "a smaller one"
    two.write_text(json.dumps(quick))
    with pytest.raises(report.BadReport, match="decode is another workload"):
        report.load([one, two])
    two.write_text("[]")
    with pytest.raises(report.BadReport, match="no result of `run`"):
        report.load([two])


def test_the_plot_is_well_formed(tmp_path: Path) -> None:
    root = ElementTree.fromstring(plot.svg(canned()))
    space = "{http://www.w3.org/2000/svg}"
    bars = [r for r in root.iter(f"{space}rect") if r.get("width") != "100%"]
    assert len(bars) == 5  # three engines decode, two of them have a prompt figure
    shown = [t.text or "" for t in root.iter(f"{space}text")]
    assert "250  (2.00)" in shown
    assert any("A <fast> & quiet machine" in text for text in shown)
    longest = max(float(b.get("x", 0)) + float(b.get("width", 0)) for b in bars)
    assert longest < float(root.get("width", 0))
    empty = copy.deepcopy(canned()) | {"rows": []}
    ElementTree.fromstring(plot.svg(empty))


def test_the_report_command_writes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(canned()))
    assert command.main(["report", str(file), "--svg", str(tmp_path / "a" / "p.svg")]) == 0
    assert "### 8-bit weights" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "a" / "p.svg")
    assert command.main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


# --------------------------------------------------------------------------- limit and scaling

MOMENT = {"read_gbs": 10.0, "int8_gops": 100.0, "bf16_gflops": 50.0}


def test_the_least_time_is_of_the_bytes_or_of_the_operations() -> None:
    cost = ModelCost(
        weight_bytes=10**9,
        kv_bytes=10**6,
        linear_ops=10**9,
        head_ops=10**8,
        attention_ops=10**6,
        windows=(0, 100),
        products="int8_gops",
    )
    # Two requests, 150 keys in the first layer and 100 in the second: 500 MB beside the weights.
    assert cost.decode_s(2, 150, MOMENT) == pytest.approx(0.15)
    # Sixty-four: 70.4 GOP of products and 3.2 of attention are longer than 7.4 GB at 10 GB/s.
    assert cost.decode_s(64, 25, MOMENT) == pytest.approx(0.704 + 0.064)
    # A prompt's keys: 150 x 151 / 2 in full; in the window 100 x 101 / 2 and then 100 each.
    keys = 11325 + 5050 + 5000
    assert cost.prompt_s(150, MOMENT) == pytest.approx(1.5 + 0.001 + keys * 1e6 / 50e9)
    assert cost.prompt_s(150, MOMENT | {"bf16_gflops": None}) is None


def scaled() -> dict[str, Any]:
    rows = [
        {
            "entry": "engineroom <8>",
            "axis": axis,
            "value": value,
            "round": round_,
            "step_s": 0.001 * value * (round_ + 1),
            "least_s": 0.0005 * value,
            "probe": {},
        }
        for axis, values in (("batch", (1, 2, 4)), ("context", (128, 256)))
        for value in values
        for round_ in range(3)
    ]
    return {
        "machine": "A <fast> machine",
        "date": "2026-01-02",
        "command": "python -m benchmarks.peers scaling",
        "threads": 2,
        "entries": ["engineroom <8>"],
        "rows": rows,
    }


def test_scaling_says_medians_and_shares_and_draws_both() -> None:
    text = scaling.markdown(scaled(), "s.svg")
    assert "| batch | engineroom <8> | least | share |" in text
    assert "| 4 | 8.00 | 2.00 | 25% |" in text
    assert "| 256 | 512.00 | 128.00 | 25% |" in text
    root = ElementTree.fromstring(scaling.svg(scaled()))
    space = "{http://www.w3.org/2000/svg}"
    curves = list(root.iter(f"{space}polyline"))
    assert [c.get("stroke-dasharray") is not None for c in curves] == [False, True] * 2
    assert len(list(root.iter(f"{space}circle"))) == 5
    wide, high = float(root.get("width", 0)), float(root.get("height", 0))
    for curve in curves:
        for point in (curve.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 < x < wide
            assert 0 < y < high
    unknown = scaled()
    for measured in unknown["rows"]:
        measured["least_s"] = None
    assert "| 4 | 8.00 | n/a | n/a |" in scaling.markdown(unknown, "s.svg")
    assert len(list(ElementTree.fromstring(scaling.svg(unknown)).iter(f"{space}polyline"))) == 2


def test_a_scaling_point_is_a_batch_or_a_context() -> None:
    points = scaling.Points()
    assert points.request("batch", 32) == (32, 64, 32)
    count, prompt, out = points.request("context", 8192)
    assert (count, prompt + out) == (1, 8192)  # the last step has the context's length


# ------------------------------------------------------------------------------------- workers

FAKE = """
import os, sys
sys.path.insert(0, WORKERS)
from protocol import serve
import time
class Fake:
    vocab = 500
    def __init__(self, model, threads, max_len, max_seqs, **options):
        print("loading", flush=True)  # must not reach the protocol
        self.how = options.get("how")
        if self.how == "dies": sys.exit("no such weights")
        if self.how == "hangs": time.sleep(60)
    def version(self): return "1"
    def cost(self): return {"weight_bytes": 1}
    def run(self, prompts, out):
        print("last words", file=sys.stderr, flush=True)
        if self.how == "dies later": os._exit(7)
        if self.how == "hangs later": time.sleep(60)
        if self.how == "refuses": raise NotImplementedError("not with me")
        assert all(100 <= i < self.vocab for p in prompts for i in p)
        return 1.0, 3.0, out * len(prompts)
serve(Fake)
"""


def fake(tmp_path: Path, how: str) -> Worker:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("WORKERS", repr(str(WORKERS))))
    asked = {"model": "", "threads": 1, "max_len": 9, "max_seqs": 1, "options": {"how": how}}
    return Worker([sys.executable, "-S", "-E", script, json.dumps(asked)])


STREAM = {"do": "stream", "prompt": 4, "out": 5, "seed": 1}


def test_a_worker_answers_also_after_a_pause(tmp_path: Path) -> None:
    with fake(tmp_path, "works") as worker:
        assert worker.receive(20)["version"] == "1"
        assert worker.ask(20, **STREAM) == {"first_s": 1.0, "total_s": 3.0, "tokens": 5}
        worker.pause()
        answer = worker.ask(20, do="batch", count=3, prompt=4, out=5, seed=1)
        assert answer == {"total_s": 3.0, "tokens": 15}
        assert run.decode_rate({"first_s": 1.0, "total_s": 3.0, "tokens": 5}) == 2.0
        assert worker.ask(20, do="memory")["peak_mib"] > 1


def test_a_refusal_leaves_the_worker_alive(tmp_path: Path) -> None:
    with fake(tmp_path, "refuses") as worker:
        worker.receive(20)
        with pytest.raises(Refused, match="not with me"):
            worker.ask(20, **STREAM)
        assert worker.ask(20, do="memory")["peak_mib"] > 1


@pytest.mark.parametrize(
    ("how", "limit", "said"),
    [
        ("dies", 20, "exit status 1.*no such weights"),
        ("hangs", 0.3, "no answer in 0 s"),
        ("dies later", 20, "exit status 7.*last words"),
        ("hangs later", 0.3, "no answer in 0 s.*last words"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_reported(
    tmp_path: Path, how: str, limit: float, said: str
) -> None:
    started = time.monotonic()
    with fake(tmp_path, how) as worker, pytest.raises(WorkerFailed, match=f"(?s){said}"):
        worker.receive(20 if "later" in how else limit)
        worker.ask(limit, **STREAM)
    assert time.monotonic() - started < 15


def test_a_failing_worker_costs_its_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("WORKERS", repr(str(WORKERS))))
    ours = table({})[0]
    good = dataclasses.replace(
        ours, format="good", peer="", steps=(), weights=lambda p: tmp_path, worker=str(script)
    )
    bad = dataclasses.replace(good, engine="peer", format="bad", options={"how": "dies later"})
    monkeypatch.setattr(probe, "build", lambda places: None)
    monkeypatch.setattr(probe, "measure", lambda places, threads: {"barrier_ns": 1.0})
    monkeypatch.setattr(run, "ready", lambda places, entries, say: (list(entries), {}))
    plan = run.Plan(4, ("4bit",), (), ("decode",), run.QUICK, 1, 20, with_kl=False)
    said: list[str] = []
    file = tmp_path / "out.json"
    result = run.run(Places(tmp_path), [good, bad], plan, file, said.append)
    assert json.loads(file.read_text())["rows"] == result["rows"]
    rows = [r for r in result["rows"] if r["entry"] == good.name]
    assert [r["values"]["rate"] for r in rows] == [3.5] * 4
    failed = [r for r in result["rows"] if r["entry"] == bad.name]
    assert len(failed) == run.GIVE_UP  # then it is left out
    assert all("last words" in r["error"] for r in failed)
    assert any("left out from here on" in line for line in said)
    assert result["costs"] == {good.name: {"weight_bytes": 1, "products": "int8_gops"}}
    # What takes longer than the patience is measured once; what it has no workload for, never.
    plan = dataclasses.replace(plan, patience=0)
    short = dataclasses.replace(good, engine="peer", only=("long",))
    rows = run.run(Places(tmp_path), [good, short], plan, None, said.append)["rows"]
    assert [r["entry"] for r in rows] == [good.name]
    plan = dataclasses.replace(plan, minutes=0)
    assert run.run(Places(tmp_path), [good], plan, None, said.append)["rows"] == []
    assert said[-1].startswith("stopped after 0 minutes")


# ----------------------------------------------------------------------------------- the rest


def test_nothing_prepared_names_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--folder", str(tmp_path / "empty")]) == 2
    error = capsys.readouterr().err
    assert "no peer is prepared" in error
    assert "python -m benchmarks.peers prepare" in error
    with pytest.raises(NotPrepared, match=r"vLLM bf16: vllm, twin not in"):
        next(e for e in table({}) if e.engine == "vLLM").check(Places(tmp_path))


def test_an_option_that_is_not_there_leaves_its_row_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Places, "marker", lambda self, step: tmp_path)
    (plain,) = run.chosen(table({}), ["engineroom Q8_0"])
    later = dataclasses.replace(plain, format="later", options={"quantization": "int1"})
    said: list[str] = []
    ready, left_out = run.ready(Places(tmp_path), [plain, later], said.append)
    assert ready == [plain]
    assert left_out["engineroom later"].startswith("engineroom later: not available: quantization")
    assert "'int1'" in left_out["engineroom later"]
    assert said == [f"left out: {left_out['engineroom later']}"]
    with pytest.raises(NotPrepared, match="none of these can run here:\nengineroom later"):
        run.ready(Places(tmp_path), [later], said.append)


def test_prepare_goes_on_after_a_failure_and_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def fails(places: Places) -> None:
        prepare.call(places, "bad", [sys.executable, "-S", "-c", "raise SystemExit('no wheel')"])

    steps = (
        prepare.Step("bad", "a bad one", fails),
        prepare.Step("after", "needs it", lambda places: ran.append("after"), ("bad",)),
        prepare.Step("good", "a good one", lambda places: ran.append("good")),
    )
    assert prepare.prepare(tmp_path, steps=steps) == 2
    said = capsys.readouterr().out
    assert "exit status 1" in said
    assert "| no wheel" in said
    assert "after: not tried, it needs bad" in said
    assert prepare.prepare(tmp_path, ["good"], steps) == 0
    assert "good: kept" in capsys.readouterr().out
    assert ran == ["good"]


def test_modes_and_the_text() -> None:
    assert [probe.mode(x) for x in (None, 40.0, 160.0, 5000.0)] == [
        "unknown",
        "near",
        "far",
        "busy",
    ]
    assert probe.mode(40.0, 0.05) == "near"
    assert probe.mode(40.0, 0.5) == "busy"
    assert "n/a" in probe.show({"barrier_ns": None})
    assert len(kl.text().split()) > 3000  # enough words for 2,000 tokens, whatever the tokenizer


def test_every_worker_exists_and_every_step_is_known() -> None:
    steps = {step.name for step in prepare.STEPS}
    for entry in table({}):
        for script in {entry.worker, entry.start or entry.worker}:
            assert (WORKERS / script).is_file()
        assert set(entry.steps) <= steps
    assert {need for step in prepare.STEPS for need in step.needs} <= steps
