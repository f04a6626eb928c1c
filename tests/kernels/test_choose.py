"""Which backend is chosen, why, and what the message says where one cannot run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

from engineroom.kernels import choose as choosing
from engineroom.kernels.backend import BackendUnavailable
from engineroom.kernels.choose import choose, create


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this look like a machine with a GPU or without, with some packages, and a driver's
    word."""

    def make(gpu: bool, packages: str, torch: str = "2.13.0", refuses: str = "") -> None:
        node = tmp_path / "nvidia0"
        if gpu:
            node.touch()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(choosing, "_GPU_NODES", (str(node),))
        monkeypatch.setattr(choosing, "_installed", lambda name: name in packages.split())
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
        monkeypatch.setattr(choosing, "_driver_refuses", lambda: refuses)

    return make


def test_a_gpu_is_taken_where_it_is_asked_for(machine) -> None:  # type: ignore[no-untyped-def]
    machine(True, "torch triton")
    choice = choose()
    assert choice.name == "cpu"
    assert "not proven on a card yet, device='cuda' asks for them" in choice.reason
    assert choose("cuda").name == "triton"
    assert choose("cpu").name == "cpu"


@pytest.mark.parametrize(
    ("gpu", "packages", "torch", "refuses", "message"),
    [
        (False, "torch triton", "2.13.0", "", "no GPU is here"),
        (True, "torch", "2.13.0", "", "triton not installed. Install: pip install 'engineroom"),
        (True, "", "2.13.0", "", "torch and triton not installed"),
        (True, "torch triton", "2.13.0+cpu", "", "is a CPU build. Install one for the GPU: pip"),
        (True, "torch triton", "2.13.0", "torch 2.13.0 sees no GPU", "torch 2.13.0 sees no GPU"),
    ],
)
def test_without_one_auto_takes_the_cpu_and_says_why(  # type: ignore[no-untyped-def]
    machine, gpu, packages, torch, refuses, message
) -> None:
    machine(gpu, packages, torch, refuses)
    choice = choose()
    assert choice.name == "cpu"
    if not refuses:
        assert message in choice.reason
        assert message in choice.available["triton"]
    with pytest.raises(BackendUnavailable, match="the GPU backend cannot run") as raised:
        choose("cuda")
    assert message in str(raised.value)


def test_auto_leaves_the_interpreter_alone(machine, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    machine(False, "torch triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose().name == "cpu"
    choice = choose("cuda")
    assert choice.name == "triton"
    assert "very slow" in choice.reason


def test_activations_that_a_backend_has_not_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="use device='cpu' or 'cuda'"):
        create(choose("reference"), activation_dtype="float16", activations="int8")
    for device in ("cpu", "reference"):
        with pytest.raises(BackendUnavailable, match="no products of 8-bit floats"):
            create(choose(device), activation_dtype="float16", activations="fp8")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="supported: auto, cpu, cuda, reference"):
        choose("tpu")
