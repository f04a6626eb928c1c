"""A batch of a real, tiny model whose process is killed from outside, anywhere, again and again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engineroom.engine.batch import verify
from engineroom.engine.batch.journal import journal_path
from tests.counts import count
from tests.engine import golden

KILLS = count(reduced=4, full=100)
REQUESTS = 80


def command(model: Path, source: Path, output: Path) -> list[str]:
    options = ["-m", str(model), "--threads", "1", "--max-num-seqs", "8", "--temperature", "0.9"]
    run = ["batch", "run", str(source), "-o", str(output)]
    return [sys.executable, "-m", "engineroom", *run, *options]


@pytest.mark.timeout(900)
def test_it_loses_nothing_and_does_nothing_twice(tmp_path: Path) -> None:
    model = golden.write(tmp_path / "model")
    source = tmp_path / "in.jsonl"
    rng = random.Random(11)
    with source.open("w") as file:
        for n in range(REQUESTS):
            prompt = f"The {n}th story: {rng.random()}"
            body = {"prompt": prompt, "max_tokens": rng.randrange(1, 60), "seed": n}
            row = {"custom_id": f"r{n}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    whole = tmp_path / "whole.jsonl"
    started = time.monotonic()
    subprocess.run(command(model, source, whole), check=True, capture_output=True, timeout=120)
    takes = time.monotonic() - started
    expected = whole.read_bytes()

    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        output = tmp_path / f"out{rounds}.jsonl"
        while kills < KILLS:  # the same batch, until one of its runs comes to the end
            with subprocess.Popen(
                command(model, source, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                try:
                    process.wait(rng.uniform(0.2, 1.1) * takes)
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
                    continue
                assert process.stdout is not None
                assert process.returncode == 0, process.stdout.read().decode()
            break
        subprocess.run(command(model, source, output), check=True, capture_output=True, timeout=120)
        assert output.read_bytes() == expected
        assert verify(output).requests == REQUESTS
        journal_path(output).unlink(missing_ok=True)
