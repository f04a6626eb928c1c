"""Meters over a powercap tree and an NVML of our own; the fit of what a request causes."""

from __future__ import annotations

import os
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.account.meter import MeterUnavailable, Model, open_meter
from engineroom.engine.account.rates import Rates
from engineroom.engine.core.cost import Cost, total

RANGE = 262143328850


def zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    made = root / folder
    made.mkdir(parents=True, exist_ok=True)
    (made / "name").write_text(name + "\n")
    (made / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made / "energy_uj"


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, what is inside one of them, and zones that count the same again."""
    (tmp_path / "intel-rapl").mkdir()
    (tmp_path / "dtpm").mkdir()
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 7)
    zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 100)
    zone(tmp_path, "intel-rapl:2", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000)
    return tmp_path


def opened(kind: str, powercap: Path, *, gpu: bool = False) -> Any:
    return open_meter(kind, gpu=gpu, watts_per_core=4.0, powercap=powercap)


def test_rapl_adds_packages_and_memory_and_nothing_twice(powercap: Path) -> None:
    meter, note = opened("auto", powercap)
    assert (meter.name, meter.estimated, note) == (
        "RAPL: package-0, intel-rapl:0:1/dram, package-1",
        False,
        "",
    )
    assert meter.read() == 0
    zone(powercap, "intel-rapl:0", "package-0", 5_250)
    zone(powercap, "intel-rapl:0:0", "core", 200)
    zone(powercap, "intel-rapl:0:1", "dram", 10)
    zone(powercap, "intel-rapl:2", "psys", 99_000_000)
    assert meter.read() == 253_000
    meter.close()


def test_a_counter_that_turned_over_goes_on(powercap: Path) -> None:
    meter, _ = opened("rapl", powercap)
    zone(powercap, "intel-rapl:1", "package-1", 50)
    assert meter.read() == 150_000
    zone(powercap, "intel-rapl:1", "package-1", 70)
    assert meter.read() == 170_000
    meter.close()


@pytest.mark.parametrize("missing", ["the folder", "packages", "a counter"])
def test_without_counters_rapl_says_why_and_auto_is_the_model(
    missing: str, powercap: Path, tmp_path: Path
) -> None:
    root = {"the folder": tmp_path / "none", "packages": tmp_path / "empty"}.get(missing, powercap)
    (tmp_path / "empty").mkdir()
    if missing == "a counter":
        (powercap / "intel-rapl:1" / "energy_uj").unlink()
    with pytest.raises(MeterUnavailable, match="RAPL"):
        opened("rapl", root)
    meter, _ = opened("auto", root)
    assert meter.estimated and meter.name == "model: 4 W for each busy core of this process"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_a_counter_for_root_alone_is_said_to_be(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").chmod(0)
    with pytest.raises(MeterUnavailable, match=r"intel-rapl:0/energy_uj: Permission denied"):
        opened("rapl", powercap)


def test_the_model_is_busy_core_seconds_times_watts() -> None:
    busy = 10**9
    meter = Model(2.5, lambda: busy)
    busy += 3 * 10**9
    assert (meter.read(), meter.estimated) == (7_500_000_000, True)


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> types.SimpleNamespace:
    """`answers["millijoules"]` is what the card counts; `fails` names a call that raises."""

    class NVMLError(Exception):
        pass

    def call(name: str, value: Any) -> Any:
        def called(*args: Any) -> Any:
            state.calls.append((name, *args))
            if answers.get("fails") == name:
                raise NVMLError("Not Supported")
            return value() if callable(value) else value

        return called

    state = types.SimpleNamespace(calls=[], millijoules=1000)
    module = types.ModuleType("pynvml")
    for name, value in {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetHandleByIndex": "by index",
        "nvmlDeviceGetHandleByUUID": "by uuid",
        "nvmlDeviceGetTotalEnergyConsumption": lambda: state.millijoules,
        "nvmlDeviceGetName": "A card",
    }.items():
        setattr(module, name, call(name, value))
    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return state


def test_a_card_counts_beside_its_host(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    nvml = fake_nvml(monkeypatch)
    meter, note = opened("auto", powercap, gpu=True)
    assert ("nvmlDeviceGetHandleByIndex", 3) in nvml.calls
    assert meter.name.startswith("NVML: A card + RAPL:") and not meter.estimated and not note
    nvml.millijoules += 2
    zone(powercap, "intel-rapl:0", "package-0", 5_001)
    assert meter.read() == 2_001_000
    meter.close()
    assert nvml.calls[-1] == ("nvmlShutdown",)


def test_a_host_that_is_estimated_makes_the_sum_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    nvml = fake_nvml(monkeypatch)
    meter, _ = opened("auto", tmp_path, gpu=True)
    assert meter.estimated and ("nvmlDeviceGetHandleByUUID", "GPU-1234") in nvml.calls


@pytest.mark.parametrize("fails", ["nvmlInit", "nvmlDeviceGetTotalEnergyConsumption", None])
def test_a_card_that_cannot_be_read_is_said_not_to_count(
    fails: str | None, powercap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails is None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        fake_nvml(monkeypatch, fails=fails)
    with pytest.raises(MeterUnavailable, match=r"nvidia-ml-py" if fails is None else "Supported"):
        opened("nvml", powercap)
    meter, note = opened("auto", powercap, gpu=True)
    assert meter.name.startswith("RAPL") and note.startswith("the GPU's energy is not counted")


def test_the_fit_finds_what_steps_cost() -> None:
    rng, rates = random.Random(1), Rates()
    for _ in range(640):
        tokens = rng.choice((1, 8, 32, 200))
        positions = tokens * rng.randrange(1, 2000)
        seconds = 2e-3 + 1e-4 * tokens + 3e-8 * positions
        rates.note(tokens, positions, seconds * rng.uniform(0.95, 1.05))
    step, token, position = rates.rates
    assert step / token == pytest.approx(20, rel=0.2)
    assert token / position == pytest.approx(1e-4 / 3e-8, rel=0.2)


def test_a_fit_never_pays_for_work() -> None:
    """Longer pasts in shorter steps, and steps that are all alike: no rate below 0 comes of it."""
    rates = Rates()
    for i in range(64):
        rates.note(4, 100 * i, 1e-3 - 1e-6 * i)
    assert min(rates.rates) >= 0 and sum(rates.rates) > 0
    alike = Rates()
    for _ in range(64):
        alike.note(4, 400, 1e-3)
    assert min(alike.rates) >= 0 and sum(alike.rates) > 0


def test_a_cost_is_told_in_a_line_and_costs_add_up() -> None:
    one, other = Cost(0.1234, None, None, False), Cost(2.0, 1.5e-6, 0.25, True)
    assert str(one) == "0.123 J"
    assert str(other) == "2 J (estimated), cost 1.5e-06, 0.25 g CO2e"
    assert total([one, None, other]) == Cost(2.1234, 1.5e-6, 0.25, True)
    assert total([None]) is None
