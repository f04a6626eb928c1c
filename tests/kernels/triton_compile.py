"""Compiles every kernel of the Triton backend ahead of time, without a GPU, and says what came out.

`python -m tests.kernels.triton_compile` prints one JSON object per line: what was compiled for
which target, its registers, stack, shared memory and instructions; --write writes docs/kernels.md.
Run it without TRITON_INTERPRET. The binaries are read with tools that the triton wheel carries.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.compiler import ASTSource

from engineroom.kernels.triton.numerics import AMD
from tests.kernels.triton_shipped import TARGETS, Configuration, configurations

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes of one program
COUNTED = ("HGMMA", "HMMA", "QGMMA", "IGMMA", "IMMA", "I2F", "LDGSTS", "MUFU.EX2", "LDL", "STL")
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(configuration: Configuration, target: str) -> dict[str, Any]:
    """Compile and read the binary."""
    parameters = list(configuration.kernel.arg_names)
    signature: dict[str, str] = {}
    for name in parameters:
        if name in configuration.constants:
            signature[name] = "constexpr"
        elif name in configuration.pointers:
            signature[name] = configuration.pointers[name]
        else:
            signature[name] = "fp32" if name in configuration.floats else "i32"
    constants = {(parameters.index(k),): v for k, v in configuration.constants.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(parameters)
        if signature[name] not in ("constexpr", "fp32") and name not in configuration.unaligned
    }
    source = ASTSource(configuration.kernel, signature, constants, attributes)
    options = configuration.options | (configuration.older if target != "sm_90" else {})
    if target == "gfx942":
        options |= AMD
    made = triton.compile(source, target=TARGETS[target], options=options)
    found: dict[str, Any] = {
        "name": configuration.name,
        "target": target,
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "expects": list(configuration.expects.get(target, ())),
        "without": list(configuration.without),
        "sums": _sums(made.asm["ttgir"]),
    }
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = _output("cuobjdump", "--dump-resource-usage", file.name)
            code = _output("nvdisasm", file.name)
        numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert numbers is not None, usage
        found["registers"], found["stack"] = int(numbers[1]), int(numbers[2])
        found["instructions"] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M))
        found |= {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in COUNTED}
    else:
        code = made.asm["amdgcn"]
        found["registers"] = int(_last(r"\.vgpr_count:\s+(\d+)", code))
        found["stack"] = int(_last(r"\.private_segment_fixed_size:\s*(\d+)", code))
        found["instructions"] = len(re.findall(r"^\t[a-z]\w+", code, re.M))
        found["MFMA"] = code.count("v_mfma")
    return found


def _sums(ttgir: str) -> list[str]:
    """Layouts that are summed over, or searched for a maximum, along the first of two axes: how
    keys are laid out among threads, and so the order of the sum. The width is left out."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.M))
    reduced = re.findall(
        r"tt\.reduce.*?axis = 0.*?\}\) : \(tensor<(\d+)x\d+xf32, (#\w+)>", ttgir, re.S
    )
    found = set()
    for keys, name in reduced:
        layout = re.sub(r"instrShape = \[(\d+), \d+", r"instrShape = [\1, any", layouts[name])
        found.add(f"{keys} keys in {layout}")
    return sorted(found)


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _last(pattern: str, text: str) -> str:
    return re.findall(pattern, text)[-1]


_PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
_BLOCK = re.compile(r"(<!-- compiled -->\n).*?(<!-- end -->)", re.DOTALL)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/kernels.md with its table written anew; a kernel that no row is of keeps its line."""
    before = _PAGE.read_text("utf-8")
    header = ["kernel", *(f"{t}: registers, shared" for t in TARGETS), "sm_90 instructions"]
    lines = ["| " + " | ".join(header) + " |\n", "| " + " | ".join("---" for _ in header) + " |\n"]
    found = _BLOCK.search(before)
    assert found is not None
    old = {line.split(" | ")[0].removeprefix("| "): line for line in found[0].splitlines(True)}
    by_name: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["target"]] = row
    for name in dict.fromkeys(configuration.name for configuration in configurations()):
        if name not in by_name:
            lines += [old[name]] if name in old else []
            continue
        made, cells = by_name[name], [name]
        for target in TARGETS:
            row = made.get(target)
            stack = f", stack {row['stack']}" if row and row["stack"] else ""
            cells.append(f"{row['registers']}, {row['shared']:,}{stack}" if row else "")
        row = made.get("sm_90")
        shown = ("HGMMA", "QGMMA", "IGMMA", "MUFU.EX2", "I2F")
        counts = [f"{row[n]} {n}" for n in shown if row[n]] if row else []
        cells.append("; ".join([f"{row['instructions']:,}", *counts]) if row else "")
        lines.append("| " + " | ".join(cells) + " |\n")
    return _BLOCK.sub(lambda m: m[1] + "".join(lines) + m[2], before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[""], help="names that contain one of these")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write what was compiled to the page")
    options = parser.parse_args()
    jobs = [
        (configuration, target)
        for configuration in configurations()
        if any(text in configuration.name for text in options.only)
        for target in options.targets
        if target in configuration.targets
    ]

    def job(pair: tuple[Configuration, str]) -> dict[str, Any]:
        try:
            return compiled(*pair)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return {"name": pair[0].name, "target": pair[1], "error": text[-600:]}

    rows = []
    with ThreadPoolExecutor(options.threads) as pool:
        for row in pool.map(job, jobs):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if options.write:
        _PAGE.write_text(page(rows), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
