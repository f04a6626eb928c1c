"""Where and when a benchmark ran: what has to stand beside every figure."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

from ..tools.doctor import command_output, cpu_facts, package_version

_PACKAGES = ("numpy", "torch", "triton")


def facts() -> dict[str, Any]:
    """Date, build, machine and versions, as plain values. Loads none of the packages."""
    cpu = cpu_facts()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engineroom": package_version("engineroom"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{cpu['name'] or cpu['machine']}, {cpu['usable_cores']} of {cpu['cores']} usable",
        "packages": {name: package_version(name) or "absent" for name in _PACKAGES},
    }


def commit() -> str | None:
    """The source tree's commit, with "-dirty" where files differ; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    return command_output(["git", "-C", str(root), "describe", "--always", "--dirty"]) or None
