"""The package as it is installed: the mapping of rooms, its neighbours, and a missing compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import engineroom
from tests.counts import FULL

from .tree import ROOMS, ROOT


def python(*arguments: str, **variables: str) -> str:
    """Run this Python in the repository's root; its output. Fails the test where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_work_from_the_root() -> None:
    assert python("-m", "engineroom", "--version") == f"engineroom {engineroom.__version__}\n"
    assert "pytest" in python("-m", "pytest", "--version")
    assert python("-O", "-m", "engineroom", "--version").startswith("engineroom ")


def test_the_console_script_is_the_module() -> None:
    script = Path(sys.executable).parent / "engineroom"
    if not script.exists():
        pytest.skip(f"{script} does not exist: the package is on the path, not installed")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"engineroom {engineroom.__version__}\n"


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == engineroom.__version__ == version("engineroom")
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"[{engineroom.__version__}]" in changelog or "[Unreleased]" in changelog


def test_the_rooms_have_no_init() -> None:
    """With one, the folder `kernels` at the root would shadow the Hugging Face package."""
    for room in ROOMS:
        assert (ROOT / room).is_dir()
        assert not (ROOT / room / "__init__.py").exists()
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "engineroom").exists()


def test_types_are_shipped() -> None:
    assert engineroom.__file__ is not None
    assert (Path(engineroom.__file__).parent / "py.typed").is_file()


def test_the_public_names_are_told_to_type_checkers() -> None:
    """The block under TYPE_CHECKING and the table that is used at run time say the same."""
    text = (ROOT / "src" / "engineroom" / "__init__.py").read_text("utf-8")
    lines = re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.MULTILINE)
    told = {name: module for module, name in lines}
    assert told == engineroom._OWNERS
    assert set(engineroom.__all__) == {"__version__", *told}
    for name in engineroom.__all__:
        assert getattr(engineroom, name) is not None
    assert set(engineroom.__all__) <= set(dir(engineroom))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = engineroom.Nothing


def _stub_of_kernels(folder: Path, number: str) -> Path:
    """A distribution named kernels, as Hugging Face's looks from outside."""
    (folder / "kernels").mkdir(parents=True)
    lines = [  # every class takes anything; every function is a decorator that changes nothing
        "def __getattr__(name):",
        "    if name.startswith('_'): raise AttributeError(name)",
        "    if name[0].isupper():",
        "        return type(name, (), {'__init__': lambda self, *a, **k: None})",
        "    return lambda *a, **k: lambda x: x",
    ]
    (folder / "kernels" / "__init__.py").write_text("\n".join(lines))
    info = folder / f"kernels-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {number}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return folder


@pytest.mark.parametrize("present", [True, False], ids=["kernels-present", "kernels-absent"])
def test_transformers_imports_beside_us(tmp_path: Path, present: bool) -> None:
    """From the repository's root, where our folder `kernels` lies on the path."""
    pytest.importorskip("torch", reason="transformers' modelling code needs torch")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not present and shutil.which("kernels"):
        pytest.skip("the real kernels distribution is installed")
    code = "import engineroom.kernels.ops\n"
    variables = {}
    if present:
        from transformers.utils import import_utils

        number = getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.0")
        variables["PYTHONPATH"] = str(_stub_of_kernels(tmp_path, number))
        code += (
            "from transformers.utils.import_utils import is_kernels_available\n"
            "assert is_kernels_available()\n"
            "import kernels\n"
            f"assert kernels.__file__.startswith({str(tmp_path)!r}), kernels.__file__\n"
        )
    code += (
        "from transformers.models.llama.modeling_llama import LlamaForCausalLM\n"
        "import engineroom.kernels.backend as ours\n"
        "assert ours.__name__ == 'engineroom.kernels.backend'\n"
        "print(LlamaForCausalLM.__name__)"
    )
    assert python("-c", code, **variables).strip() == "LlamaForCausalLM"


def test_a_missing_compiler_is_explained(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not on the path; the build brings its own")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "none").mkdir()
    for name in ("make", "ninja", "uname", "sh"):  # a machine that builds, without a compiler
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    done = subprocess.run(
        [cmake, "-S", ROOT / "kernels" / "cpu", "-B", tmp_path / "build"],
        capture_output=True,
        text=True,
        env={"PATH": str(tools), "CXX": str(tmp_path / "none" / "g++"), "HOME": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "engineroom: no C++ compiler was found" in said
    for remedy in ("apt-get install g++", "xcode-select --install", "CXX=/path/to/g++"):
        assert remedy in said


def test_a_wheel_would_hold_every_room() -> None:
    """The mapping names every room; C++ sources stay out of the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["scikit-build"]["wheel"]
    assert wheel["packages"] == {
        "engineroom": "src/engineroom",
        **{f"engineroom/{room}": room for room in ROOMS},
    }
    for file in (ROOT / "kernels" / "cpu").iterdir():
        if file.suffix in (".cpp", ".hpp", ".h", ".txt"):
            target = f"engineroom/kernels/cpu/{file.name}"
            assert any(Path(target).match(pattern) for pattern in wheel["exclude"]), target


# What an installed wheel must do, in an interpreter that knows nothing of the editable install.
_FROM_THE_WHEEL = """
import sys
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])
import engineroom
from engineroom.engine.cli import main
from engineroom.engine.load.gguf import GgufFile
from engineroom.kernels.cpu import _native
from engineroom.quant.gguf import dequantise
for module in (sys.modules["engineroom"], sys.modules[main.__module__], _native):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
sys.exit(main(["models"]))
"""


def test_a_wheel_is_built_and_works(tmp_path: Path) -> None:
    """From a copy of the tree: what pip makes of it answers from its own files alone."""
    if not FULL:
        pytest.skip("a build in isolation takes 20 s and a package index: only in `make test-all`")
    source, site = tmp_path / "source", tmp_path / "site"
    kept_out = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=kept_out, symlinks=True)
    pip = ("-m", "pip", "--disable-pip-version-check")
    python(*pip, "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("engineroom-*.whl")
    python(*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel))
    assert (site / "engineroom" / "py.typed").is_file()
    assert not [p for p in site.rglob("*") if p.suffix in (".cpp", ".hpp", ".h")]
    libraries = sysconfig.get_path("platlib")
    said = python("-I", "-S", "-c", _FROM_THE_WHEEL, str(site), libraries)
    assert "smollm2" in said and "LlamaForCausalLM" in said


def test_the_ci_runs_what_a_contributor_runs() -> None:
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    commands = [
        line
        for line in run.read_text("utf-8").splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["exec make test"]


def test_no_dependency_pulls_another_torch() -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = re.search(r"^torch==(\d+)\.(\d+)", pins, re.MULTILINE)
    assert pinned is not None
    assert (int(pinned[1]), int(pinned[2])) >= (2, 11)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert not any(d.startswith(("torch", "transformers")) for d in project["dependencies"])
