"""What importing costs, counted in modules: seconds depend on the machine, these do not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.data import model_path

from .tree import ROOT

THIRD_PARTY = {
    "numpy",
    "torch",
    "jinja2",
    "msgspec",
    "tokenizers",
    "sentencepiece",
    "tqdm",
    "transformers",
    "huggingface_hub",
    "yaml",
}


def loaded(code: str) -> set[str]:
    """Modules that a fresh interpreter has after `code` and had not before."""
    probe = (
        "import sys, json, io\n"
        "from contextlib import redirect_stderr, redirect_stdout\n"
        "before = set(sys.modules)\n"
        "with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):\n"
        f"    {code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(json.loads(done.stdout))


def test_a_model_on_a_cpu_needs_no_email_package() -> None:
    """importlib.metadata brings it in, with 2 MiB."""
    assert not loaded("import engineroom.engine.llm, engineroom.kernels.cpu.backend") & {
        "email.message",
        "importlib.metadata",
    }


def third_party(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in THIRD_PARTY}


@pytest.mark.parametrize(
    ("code", "budget"),
    [
        ("import engineroom", 20),
        ("from engineroom.engine.cli import main; main(['--help'])", 50),
        ("from engineroom.engine.cli import main; main(['--version'])", 50),
        ("from engineroom.engine.cli import main; main(['complete', '--help'])", 100),
        ("from engineroom.engine.cli import main; main(['chat', '--help'])", 100),
        ("from engineroom.engine.cli import main; main(['complete', '--no-such-flag'])", 100),
        ("from engineroom import SamplingParams", 60),
    ],
)
def test_the_door_opens_without_the_house(code: str, budget: int) -> None:
    modules = loaded(code)
    assert not third_party(modules)
    assert len(modules) <= budget, f"{len(modules)} modules: {sorted(modules)}"


def test_models_and_inspect_load_no_torch() -> None:
    """Their answers come from headers and tables; torch costs a second and 200 MB."""
    modules = loaded("from engineroom.engine.cli import main; main(['models'])")
    assert not {"torch", "transformers"} & {name.split(".")[0] for name in modules}
    modules = loaded("import engineroom.engine.tools.inspect")
    assert not {"torch", "transformers"} & {name.split(".")[0] for name in modules}


def test_an_answer_on_a_cpu_loads_no_torch() -> None:
    """It costs a second and 200 MB, three times what the answer itself takes."""
    path = model_path("smollm2")
    code = (
        "from engineroom.engine.cli import main; "
        f"assert main(['complete', '-m', {str(path)!r}, 'hi', '--max-tokens', '1']) == 0"
    )
    tops = {name.split(".")[0] for name in loaded(code)}
    assert "tokenizers" in tops
    assert not {"torch", "transformers", "triton", "bitsandbytes", "tqdm"} & tops


def test_the_count_can_fail() -> None:
    modules = loaded("import numpy")
    assert third_party(modules)
    assert len(modules) > 90
