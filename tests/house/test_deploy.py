"""examples/deploy: its files name metrics, flags and variables that exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .tree import ROOT

DEPLOY = ROOT / "examples" / "deploy"


def test_the_dashboard_asks_for_metrics_that_are_told() -> None:
    pytest.importorskip("prometheus_client", reason="the server's extra is not installed")
    from engineroom.engine.serve.metrics import Metrics

    metrics = Metrics("m")
    metrics.answered("/health", 200)
    metrics.ended(None, 1.0)
    told: dict[str, set[str]] = {}
    text = metrics.page({"scheduler": {"num_running": 1}}, ready=True, restarts=0).decode()
    for name, labels in re.findall(r"^(engineroom_\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        told.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    kinds = set(re.findall(r"^# TYPE (engineroom_\w+) ", text, re.MULTILINE))
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    assert len(asked) > 15
    for expr in asked:
        names = re.findall(r"engineroom_\w+", expr)
        assert names, expr
        for name in names:
            # A family without a sample yet (of a label that none has had) is there by its type.
            assert name in told or name.removesuffix("_bucket") in kinds, name
    by = {
        label
        for expr in asked
        for found in re.findall(r"by \((.*?)\)", expr)
        for label in found.split(", ")
    }
    assert by <= {"le"} | set().union(*told.values())


def test_panels_lie_beside_each_other() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({p["id"] for p in panels}) == len(panels)

    def cells(at: dict[str, Any]) -> set[tuple[int, int]]:
        rows, columns = range(at["y"], at["y"] + at["h"]), range(at["x"], at["x"] + at["w"])
        return {(x, y) for x in columns for y in rows}

    taken: set[tuple[int, int]] = set()
    for panel in panels:
        mine = cells(panel["gridPos"])
        assert not mine & taken and max(x for x, _ in mine) < 24, panel["title"]
        taken |= mine


@pytest.mark.parametrize("name", ["Dockerfile", "engineroom.service"])
def test_commands_have_only_flags_that_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from engineroom.engine.cli import main

    assert main(["serve", "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    text = (DEPLOY / name).read_text()
    ours = re.findall(r"engineroom\S* serve (.*(?:\\\n.*)*)|CMD \[\"serve\", (.*)\]", text)
    flags = {f for parts in ours for part in parts for f in re.findall(r"--[a-z][a-z-]+", part)}
    assert "--host" in flags and flags <= known


def test_variables_are_those_that_the_engine_reads() -> None:
    source = "".join(p.read_text("utf-8") for p in (ROOT / "engine").rglob("*.py"))
    for path in DEPLOY.iterdir():
        for name in re.findall(r"ENGINEROOM_[A-Z_]+", path.read_text("utf-8")):
            assert f'"{name}"' in source, f"{path.name}: {name}"
