"""Every example is short and runs, on the golden random model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import golden

from .tree import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 80


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden.write(tmp_path_factory.mktemp("golden"))


def test_there_are_examples() -> None:
    assert {"generate.py", "chat.py", "stream.py", "async_stream.py"} <= {p.name for p in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_it_is_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) < MAX_LINES
    assert f"python examples/{path.name}" in path.read_text("utf-8").splitlines()[0]


@pytest.mark.torch
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_it_runs(path: Path, model: Path) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    done = subprocess.run(
        [sys.executable, path, str(model)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
