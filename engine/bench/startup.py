"""`engineroom bench startup`: from the start of a process to its first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..config import EngineConfig
from ..tools.options import engine_arguments
from .model import LEAD, Subject, publish, rounds
from .spread import spread, spread_columns
from .tables import Column, Table
from .timing import Repeats

_WRITES_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}  # whatever stands in this process's environment
_COMPILED, _COLD = "compiled", "cold"  # what stands in the column of modules
_COLUMNS = (*LEAD, Column("modules", "modules"), *spread_columns("first", "first token"))


def command(config: EngineConfig) -> list[str]:
    """A process that answers with one token, whatever token it is."""
    answer = ["--max-tokens", "1", "--ignore-eos", "--no-skip-special-tokens"]
    given = ["-m", config.model, *answer, *engine_arguments(config)]
    return [sys.executable, "-m", "engineroom", "complete", "hi", *given]


def first_token(command: Sequence[str], *, cold: bool) -> float:
    """Seconds from before the process to the first byte of its answer, or to an empty one's end.

    `cold`: it finds no compiled module, so it compiles each, Python's own among them.
    Errors: subprocess.CalledProcessError.
    """
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, **_WRITES_COMPILED}
        if cold:
            environment["PYTHONPYCACHEPREFIX"] = empty
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def run(config: EngineConfig, *, repeats: Repeats, paths: Mapping[str, str | None]) -> int:
    """Measure with modules compiled and cold, print the table, write the files.

    A process that fails says why on stderr, and its exit status is returned.
    """
    subject, start = Subject.of(config), command(config)
    # Once for the prompt's length; it also leaves compiled modules behind.
    environment = {**os.environ, **_WRITES_COMPILED}
    tried = subprocess.run([*start, "--json"], stdout=subprocess.PIPE, env=environment, check=False)
    if tried.returncode:
        return tried.returncode
    input_len = json.loads(tried.stdout)["usage"]["prompt_tokens"]
    rows: list[dict[str, Any]] = []
    for modules in (_COMPILED, _COLD):
        once = partial(first_token, start, cold=modules == _COLD)
        times = rounds(f"modules {modules}", repeats, once)
        cells = {"modules": modules} | spread("first", times)
        rows.append(subject.row(1, input_len, 1, repeats) | cells)
    publish(Table("Startup", _COLUMNS, rows), config, {"backend": subject.backend}, paths)
    return 0
