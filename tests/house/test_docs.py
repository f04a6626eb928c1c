"""Documentation that cannot drift: generated tables, links, file names, the README's example."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import model_path

from .generate_docs import PARTS, generated, pages
from .tree import ROOT

PAGES = [*pages(), *sorted(ROOT.glob("*.md"))]
README = (ROOT / "README.md").read_text("utf-8")
# A path of this repository in running text, such as `engine/core/plan.py` or `tests/load/`.
_PATH = re.compile(r"`((?:src|engine|kernels|quant|tests|examples|benchmarks|docs|\.ci)/[\w./-]*)`")


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.name)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text("utf-8")
    assert generated(text) == text, "run `make docs`"


def test_every_generated_part_is_on_a_page() -> None:
    found = {name for page in pages() for name in re.findall(r"generated: (\S+)", page.read_text())}
    assert found == set(PARTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_file_names_resolve(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in _PATH.findall(text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_anchors_of_error_messages_exist() -> None:
    from engineroom.engine.tools.errors import ERRORS

    headings = re.findall(r"^### (\S+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert headings == [row.code for row in ERRORS]


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_readme_example_is_ten_lines() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 10
    ast.parse(example())


def test_the_readme_example_runs(golden_or_real_model: Path) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    code = example().replace('"smollm2"', repr(str(golden_or_real_model)))
    assert str(golden_or_real_model) in code
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20


def test_the_readme_commands_exist() -> None:
    from engineroom.engine.cli import main

    for line in re.findall(r"^engineroom (\w+)", README, re.MULTILINE):
        assert main([line, "--help"]) == 0
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake ([a-z-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_figures_name_their_date() -> None:
    """In docs/performance.md each table of figures stands in a section that names a date."""
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert "<!-- figures -->" in text
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE):
        if re.search(r"^\|.*\d.*\|$", section, re.MULTILINE):
            assert re.search(r"\b20\d\d-\d\d-\d\d\b", section), section.splitlines()[0]


@pytest.fixture(scope="session")
def golden_or_real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """smollm2 where it is here, else the golden random model: the code runs all the same."""
    try:
        return model_path("smollm2")
    except pytest.skip.Exception:
        from tests.engine import golden

        return golden.write(tmp_path_factory.mktemp("golden"))
