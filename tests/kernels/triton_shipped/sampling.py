"""The kernels of sampling, at a vocabulary of 131,072."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton

from engineroom.kernels.triton import (
    sampling,
    sampling_draw,
    sampling_edits,
    sampling_filters,
    sampling_logprobs,
)
from engineroom.kernels.triton.numerics import OPTIONS, next_power_of_two
from engineroom.kernels.triton.sampling_rows import BAN, BIAS, CHUNK, HISTORY

from .configuration import Configuration

VOCAB = 131072


def configurations() -> Iterator[Configuration]:
    """The kernels of sampling, which know a vocabulary by its number of chunks."""
    chunks = next_power_of_two(triton.cdiv(VOCAB, CHUNK))
    integers = ("rows", "mask", "ids", "tokens", "logprobs", "ranks", "top_ids", "top_logprobs")
    types = {f"{name}_ptr": "*i32" for name in integers}
    types |= {f"{name}_ptr": "*fp32" for name in ("x", "work", "z", "out")}
    types |= {"found_ptr": "*i64", "tops_ptr": "*i64"}
    row, part = (
        {"BLOCK": sampling.BLOCK, "CHUNKS": chunks},
        {"CHUNK": CHUNK, "CHUNKS": chunks},
    )

    def made(name: str, kernel: Any, constants: dict[str, Any], **more: str) -> Configuration:
        of_row = "BLOCK" in constants
        return Configuration(
            f"sampling {name}",
            kernel,
            {k: v for k, v in (types | more).items() if k in kernel.arg_names},
            constants,
            sampling.ROW_OPTIONS if of_row else OPTIONS,
            ("width", "chunks"),
        )

    yield made("largest", sampling_draw.largest_kernel, {"CHUNK": CHUNK})
    yield made(f"draw V {VOCAB}", sampling_draw.draw_kernel, part)
    yield made(f"finish V {VOCAB}", sampling_draw.finish_kernel, {"CHUNKS": chunks})
    yield made("copy", sampling_edits.copy_kernel, {"CHUNK": CHUNK})
    for name, stage in (("bias", BIAS), ("ban", BAN), ("history", HISTORY)):
        constants = {"STAGE": stage.value, "ENTRIES": sampling_edits.ENTRIES}
        values = "*fp32" if name == "bias" else "*i32"
        yield made(name, sampling_edits.edit_kernel, constants, values_ptr=values)
    yield made(f"sigma V {VOCAB}", sampling_filters.sigma_kernel, row)
    yield made(f"count V {VOCAB}", sampling_filters.count_kernel, part)
    yield made(f"list V {VOCAB}", sampling_filters.list_kernel, part)
    yield made(f"filter V {VOCAB}", sampling_filters.filter_kernel, row)
    yield made(f"weigh V {VOCAB}", sampling_logprobs.weigh_kernel, part)
    yield made("top", sampling_logprobs.top_kernel, {"CHUNK": CHUNK})
    yield made(f"logprobs V {VOCAB}", sampling_logprobs.logprobs_kernel, row)
    yield made(f"log_softmax V {VOCAB}", sampling_logprobs.log_softmax_kernel, part)
