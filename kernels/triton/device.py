"""Where kernels run: the GPU that torch sees, or tensors on the CPU under Triton's interpreter."""

from __future__ import annotations

import torch

import triton

OLDEST = (8, 0)  # compute capability: bf16 in the tensor cores, asynchronous copies
FP8_SINCE = (9, 0)


def interpreted() -> bool:
    """Whether kernels run in numpy, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def unusable() -> str:
    """Why no kernel can run here, with the way to mend it, or nothing. Asks the driver."""
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no GPU: the driver is missing or older than this "
            "build needs (nvidia-smi tells), or CUDA_VISIBLE_DEVICES hides the card"
        )
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        return (
            f"{torch.cuda.get_device_name()} has compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; the kernels need "
            f"{'.'.join(map(str, OLDEST))}"
        )
    return ""


def device() -> torch.device:
    """Where tensors of this backend lie."""
    return torch.device("cpu" if interpreted() else "cuda")


def loads_ahead() -> bool:
    """Whether attention loads keys and values ahead: see attention.options."""
    nvidia = torch.version.hip is None and not interpreted()
    return nvidia and torch.cuda.get_device_capability() >= (9, 0)


def lacks_fp8() -> str:
    """Why 8-bit floats cannot be multiplied here, or nothing."""
    if interpreted():
        return ""
    name = torch.cuda.get_device_name()
    if torch.version.hip is not None:
        return f"{name} multiplies 8-bit floats of another kind than checkpoints hold"
    have = torch.cuda.get_device_capability()
    if have >= FP8_SINCE:
        return ""
    return (
        f"{name} has compute capability {'.'.join(map(str, have))} and no products of 8-bit "
        f"floats, which begin with {'.'.join(map(str, FP8_SINCE))}"
    )


def event(device: torch.device) -> torch.cuda.Event | None:
    """An event recorded now, behind what was launched; None under the interpreter, which has run
    it already."""
    if device.type != "cuda":
        return None
    made = torch.cuda.Event()  # type: ignore[no-untyped-call]
    made.record()
    return made


def free_bytes() -> int | None:
    """Device memory that is free now; None where tensors lie in the host's memory."""
    return None if interpreted() else int(torch.cuda.mem_get_info()[0])


def card() -> str:
    """The device's name."""
    return "Triton's interpreter on the CPU" if interpreted() else torch.cuda.get_device_name()


def describe() -> dict[str, str]:
    """The device and the packages."""
    return {"device": card(), "torch": torch.__version__, "triton": triton.__version__}
