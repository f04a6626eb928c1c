"""llama.cpp behind the worker protocol, through its own llama-batched-bench, a process per request.

That tool feeds random tokens and draws no samples, so its figures are, if anything, a little kind.
It warms itself up. Threads, batch (2,048, in parts of 512) and flash attention are its defaults or
better: with flash attention off each workload is slower on this kind of machine.
Options: {"tool": path of llama-batched-bench, "kv": the cache's type}.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from protocol import Ids, serve


class LlamaCpp:
    vocab = 1000  # the tool draws its own random tokens; only the lengths of ours are used

    def __init__(
        self, model: str, threads: int, max_len: int, max_seqs: int, tool: str, kv: str = "f16"
    ):
        self._command = [tool, "-m", model, "-t", str(threads), "--output-format", "jsonl"]
        self._command += ["-fa", "on", "-ctk", kv, "-ctv", kv]
        self._peak_kib = 0
        if not os.access(tool, os.X_OK):
            raise FileNotFoundError(tool)

    def version(self) -> str:
        done = subprocess.run(
            [self._command[0], "--version"], capture_output=True, text=True, check=False
        )
        lines = [x for x in (done.stdout + done.stderr).splitlines() if x.startswith("version")]
        return lines[0].removeprefix("version:").strip() if lines else "unknown"

    def run(self, prompts: list[Ids], out: int) -> tuple[float | None, float, int]:
        count, length = len(prompts), len(prompts[0])
        steps = max(out - 1, 1)  # the prompt itself gives the first token
        context = count * (length + steps + 256)
        command = [*self._command, "-c", str(context), "-npl", str(count)]
        command += ["-npp", str(length), "-ntg", str(steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if process.returncode or not rows:
            raise RuntimeError(f"llama-batched-bench: exit status {process.returncode}")
        self._peak_kib = max(self._peak_kib, usage.ru_maxrss)
        prompt, decode = rows[-1]["t_pp"], rows[-1]["t_tg"] if out > 1 else 0.0
        return prompt, prompt + decode, out * count

    def logits(self, ids: Ids) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError("the tool gives no logits; llama-cpp-python does")

    def peak_mib(self) -> float:
        return self._peak_kib / 1024


if __name__ == "__main__":
    serve(LlamaCpp)
