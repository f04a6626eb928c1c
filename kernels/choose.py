"""Which backend runs here and why: what is missing for each, and the chosen one constructed.

The one file that knows every backend. Asking imports none of them: it looks for files and packages.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .backend import Backend, BackendUnavailable

DEVICES = ("auto", "cpu", "cuda", "reference")


@dataclass(frozen=True)
class Choice:
    """Which backend runs, and why."""

    name: str
    reason: str
    available: Mapping[str, str]  # every backend's name -> "usable" or why it is not


def choose(device: str = "auto") -> Choice:
    """Pick a backend for `device`, one of DEVICES. Imports torch only where a GPU is asked for.

    Errors: BackendUnavailable naming what is missing and the command that brings it.
    """
    if device not in DEVICES:
        raise BackendUnavailable(
            f"device {device!r} has no backend in this version; supported: {', '.join(DEVICES)}"
        )
    missing = _missing_for_gpu()
    available = {
        "cpu": _missing_native() or "usable",
        # The driver's answer costs an import of torch, which a step on the CPU has no use for.
        "triton": missing or (_driver_refuses() if device == "cuda" else "") or "usable",
        "reference": "usable" if _installed("torch") else "needs torch, which is not installed",
    }
    if device == "cuda":
        if available["triton"] != "usable":
            raise BackendUnavailable(f"the GPU backend cannot run: {available['triton']}")
        return Choice("triton", f"asked for; Triton kernels{_on_interpreter()}", available)
    if device != "reference":
        if available["cpu"] != "usable":
            raise BackendUnavailable(
                f"the CPU backend cannot run: {available['cpu']}. "
                "Install again: pip install --force-reinstall engineroom"
            )
        # Kernels that no card has run yet are for who asks for them.
        unproven = "its kernels are not proven on a card yet, device='cuda' asks for them"
        asked = "asked for" if device == "cpu" else f"no GPU is used: {missing or unproven}"
        return Choice("cpu", f"{asked}; native kernels on the CPU", available)
    if available["reference"] != "usable":
        raise BackendUnavailable(
            "the reference backend needs torch, which is not installed. "
            "Install it: pip install 'engineroom[torch]' (a CPU build of torch is enough; "
            "see https://pytorch.org/get-started/locally/)"
        )
    return Choice("reference", "asked for; readable torch on the CPU, slow", available)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _missing_native() -> str:
    """Why the compiled module cannot be imported, or nothing."""
    try:
        importlib.import_module(f"{__package__}.cpu._native")
    except ImportError as error:
        return str(error)
    return ""


def _on_interpreter() -> str:
    """What to add to a reason where Triton would run on the CPU, or nothing."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
    return " under Triton's interpreter (TRITON_INTERPRET), on the CPU, very slow" if asked else ""


def _missing_for_gpu() -> str:
    """What files and packages say is missing for kernels on a GPU, with the way to mend it, or
    nothing. Imports neither torch nor triton."""
    if not _on_interpreter() and not any(glob.glob(pattern) for pattern in _GPU_NODES):
        return f"no GPU is here (none of {', '.join(_GPU_NODES)})"
    absent = [package for package in ("torch", "triton") if not _installed(package)]
    if absent:
        return (
            f"{' and '.join(absent)} not installed. Install: pip install 'engineroom[gpu]' "
            "(triton exists for Linux)"
        )
    # Late: it brings in the e-mail package and 2 MiB, which no run on a CPU needs.
    version = importlib.import_module("importlib.metadata").version("torch")
    if not _on_interpreter() and version.endswith("+cpu"):
        return (
            f"torch {version} is a CPU build. Install one for the GPU: "
            "pip install --force-reinstall torch"
        )
    return ""


def _driver_refuses() -> str:
    """Why torch and the driver cannot run kernels, or nothing."""
    try:
        return str(importlib.import_module(f"{__package__}.triton.device").unusable())
    except ImportError as error:
        return f"{error}. Install again: pip install --force-reinstall 'engineroom[gpu]'"


# Device nodes of NVIDIA's and AMD's drivers, and of Windows' Linux.
_GPU_NODES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


def preload(choice: Choice) -> Callable[[], None]:
    """Begin importing what `create` needs in a thread; the returned call waits for it."""

    def importer() -> None:
        with contextlib.suppress(Exception):  # create() meets it again, in the caller's thread
            importlib.import_module(_MODULES[choice.name])

    thread = threading.Thread(target=importer, daemon=True)
    thread.start()
    return thread.join


_MODULES = {name: f"{__package__}.{name}" for name in ("reference", "triton")} | {
    "cpu": f"{__package__}.cpu.backend"
}


def create(
    choice: Choice,
    *,
    activation_dtype: str,
    threads: int | None = None,
    activations: str = "auto",
    packed_cache: tuple[Path, str] | None = None,
) -> Backend:
    """Construct the chosen backend. activation_dtype is a key of DTYPE_BYTES.

    activations: what multiplies quantised weights, "auto", "int8", "fp8" or "float32".
    packed_cache: a file for the weights as the backend lays them out, and what they are made of.
    Errors: BackendUnavailable where the backend has no such thing.
    """
    if activations == "fp8" and choice.name != "triton":
        raise BackendUnavailable(
            f"activations='fp8': the {choice.name} backend has no products of 8-bit floats; use "
            "device='cuda' on a card that has, or activations='auto'"
        )
    if choice.name == "cpu":
        from .cpu.backend import CpuBackend  # late: the reference needs none of it

        return CpuBackend(
            activation_dtype=activation_dtype,
            threads=threads,
            activations=activations,
            packed_cache=packed_cache,
        )
    if packed_cache is not None:
        raise BackendUnavailable(
            f"packed_cache: the {choice.name} backend keeps no file; "
            "use device='cpu', or leave it out"
        )
    if choice.name == "triton":
        from .triton import TritonBackend  # optional third party: torch, triton

        return TritonBackend(
            activation_dtype=activation_dtype, threads=threads, activations=activations
        )
    if activations == "int8":
        raise BackendUnavailable(
            f"activations='int8': the {choice.name} backend multiplies weights by the activations "
            "themselves; use device='cpu' or 'cuda', or activations='auto'"
        )
    from .reference import ReferenceBackend  # optional third party: torch

    return ReferenceBackend(activation_dtype=activation_dtype, threads=threads)
