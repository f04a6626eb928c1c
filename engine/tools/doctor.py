"""`engineroom doctor`: this machine, what is installed, what would run and why, a self-check."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ...kernels.backend import Backend, BackendUnavailable
from ...kernels.choose import choose, create
from ..config import show_bytes
from ..load.fetch import models_dir
from ..runtime.memory import available_memory

_PACKAGES = {
    "needed": ("numpy", "jinja2", "msgspec", "sentencepiece", "tokenizers", "tqdm"),
    "optional": ("torch", "triton", "transformers", "bitsandbytes", "huggingface_hub"),
}
_OK, _NO_BACKEND, _FAILED = 0, 7, 9


def examine() -> dict[str, Any]:
    """Everything, as plain values. Loads no torch."""
    backend, backends = _backend()
    return {
        "engineroom": package_version("engineroom"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": cpu_facts(),
        "gpus": gpu_names(),
        "memory": {"available": available_memory(), "total": _total_memory()},
        "cache": {"folder": str(models_dir()), "free": _free(models_dir())},
        "packages": {
            kind: {name: package_version(name) for name in names}
            for kind, names in _PACKAGES.items()
        },
        "backends": backends,
        "checks": _checks(backend),
    }


def exit_status(report: dict[str, Any]) -> int:
    """0 where all is well, 9 after a failed check, 7 where no backend can run."""
    if any(not check["passed"] for check in report["checks"]):
        return _FAILED
    return _OK if report["backends"]["chosen"] else _NO_BACKEND


def _backend() -> tuple[Backend | None, dict[str, Any]]:
    try:
        choice = choose("auto")
        backend = create(choice, activation_dtype="float32")
    except BackendUnavailable as error:
        return None, {"chosen": None, "reason": str(error), "facts": {}, "available": {}}
    return backend, {
        "chosen": choice.name,
        "reason": choice.reason,
        "facts": backend.describe(),
        "available": dict(choice.available),
    }


def _checks(backend: Backend | None) -> list[dict[str, Any]]:
    try:
        from .selfcheck import run_checks
    except ImportError as error:  # the compiled module is missing or of another Python
        found = f"{error}; install again: pip install --force-reinstall engineroom"
        return [{"check": "native module", "passed": False, "found": found, "seconds": 0.0}]
    return run_checks(backend)


def cpu_facts() -> dict[str, Any]:
    try:
        from ...kernels.cpu import _native

        features = sorted(name for name, usable in _native.cpu_features().items() if usable)
    except ImportError:
        features = []
    return {
        "name": _cpu_name(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "features": features,
    }


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return command_output(["sysctl", "-n", "machdep.cpu.brand_string"])
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_names() -> list[str]:
    """Names of NVIDIA GPUs, whether or not torch sees them."""
    if shutil.which("nvidia-smi") is None:
        return []
    return [
        line for line in command_output(["nvidia-smi", "-L"]).splitlines() if line.startswith("GPU")
    ]


def command_output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _free(folder: Path) -> int | None:
    existing = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
    return shutil.disk_usage(existing).free if existing else None


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    cpu, memory, backends = report["cpu"], report["memory"], report["backends"]
    free = report["cache"]["free"]
    lines = [
        f"engineroom {report['engineroom']} on Python {report['python']} ({report['executable']})",
        f"  platform   {report['platform']}",
        f"  cpu        {cpu['name'] or cpu['machine']}: {cpu['usable_cores']} of {cpu['cores']} "
        f"cores usable; {', '.join(cpu['features']) or 'no instruction set extension found'}",
        f"  gpu        {'; '.join(report['gpus']) or 'none found'}",
        f"  memory     {show_bytes(memory['available'])} available of "
        f"{show_bytes(memory['total'])}",
        f"  models     {report['cache']['folder']}"
        + (f" ({show_bytes(free)} free)" if free is not None else ""),
    ]
    for kind, packages in report["packages"].items():
        shown = ", ".join(f"{n} {v or 'absent'}" for n, v in packages.items())
        lines.append(f"  {kind:<10} {shown}")
    lines.append(f"backend: {backends['chosen'] or 'none'}, because {backends['reason']}")
    lines += [f"  {name:<10} {state}" for name, state in backends["available"].items()]
    lines += [f"  {name:<10} {fact}" for name, fact in backends["facts"].items()]
    lines.append("self-check")
    lines += [
        f"  {'ok    ' if c['passed'] else 'FAILED'} {c['check']}: {c['found']} "
        f"({c['seconds']:.2f} s)"
        for c in report["checks"]
    ]
    return "\n".join(lines)


__all__ = [
    "command_output",
    "cpu_facts",
    "examine",
    "exit_status",
    "gpu_names",
    "package_version",
    "render",
]
