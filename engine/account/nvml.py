"""NVIDIA's counter of a card's energy, through NVML (package nvidia-ml-py).

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption: millijoules since the driver was
loaded, Volta and newer. It is of the whole card and renewed some ten times a second.
"""

from __future__ import annotations

import os
from typing import Any

from .unavailable import MeterUnavailable


class Nvml:
    """The card that CUDA calls 0. Errors: MeterUnavailable."""

    estimated = False

    def __init__(self) -> None:
        try:
            import pynvml
        except ModuleNotFoundError as error:
            raise MeterUnavailable(
                "NVML needs the package nvidia-ml-py: pip install 'engineroom[energy]'"
            ) from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._card = _first_visible(pynvml)
            self._start = int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._card))
            card = pynvml.nvmlDeviceGetName(self._card)
        except pynvml.NVMLError as error:
            raise MeterUnavailable(f"NVML: {error}; `nvidia-smi -q -d POWER` says more") from error
        self.name = f"NVML: {card.decode() if isinstance(card, bytes) else card}"

    def read(self) -> int:
        now = int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card))
        return (now - self._start) * 1_000_000

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _first_visible(pynvml: Any) -> Any:
    """CUDA_VISIBLE_DEVICES names cards by UUID or by number (of CUDA_DEVICE_ORDER=PCI_BUS_ID)."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    if first.startswith("GPU-"):
        return pynvml.nvmlDeviceGetHandleByUUID(first)
    return pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdigit() else 0)


__all__ = ["Nvml"]
