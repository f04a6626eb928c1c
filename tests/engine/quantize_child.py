"""Quantises a folder and prints what memory that took, as JSON: sizes in bytes.

Run: python -m tests.engine.quantize_child METHOD FORMAT SAMPLES TINY MODEL OUT. TINY is quantised
first, so that libraries are resident before the measurement begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engineroom.engine.tools.quantize import QuantizeConfig, quantize
from engineroom.engine.tools.texts import Text
from tests.engine.resident_child import status

CONTEXT = 64
TEXT = Text("a story", "Once upon a time there was a little girl who had a red ball. " * 60)


def main() -> None:
    method, format, samples, tiny, model, out = sys.argv[1:]
    sizes = {}
    for name, path in (("tiny", tiny), ("model", model)):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
        before = status("VmRSS")
        config = QuantizeConfig(
            model=path,
            out=f"{out}-{name}",
            method=method,
            format=format,
            samples=int(samples),
            context=CONTEXT,
            device="cpu",
            threads=1,
        )
        report = quantize(config, TEXT)
        sizes = {"peak": status("VmHWM") - before, "bytes": report["bytes"]}
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
