"""Who may import whom: the table of rooms, enforced over every file by AST."""

from __future__ import annotations

import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .tree import ROOT, Import, imports, package_files

# A room is named by the longest matching prefix of a module's name below engineroom. It may import
# itself and what is listed; a listed name allows everything below it.
_CLIENT = (
    "engine.client",
    "engine.client_thread",
    "engine.client_process",
    "engine.child",
    "engine.mailbox",
    "engine.supervise",
)
_WIRE = ("engine.wire", "engine.differences")
_BELOW_FACES = ("engine.core", "engine.features", "engine.account", "engine.config")
_FACES = ("engine.llm", "engine.async_llm", "engine.batch")
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "quant": ("kernels.weights", "kernels.ops"),
    "engine.config": (),
    "engine.core": (),
    "engine.features": ("engine.core",),
    "engine.dialects": (),
    "engine.account": ("engine.core",),
    "engine.models": ("kernels.ops", "engine.config"),
    "engine.load": ("engine.config", "quant", "kernels.weights"),
    "engine.runtime": (
        "engine.core",
        "engine.features",
        "engine.config",
        "engine.models",
        "engine.load",
        "kernels",
        "quant",
    ),
    # What an engine's answers depend on; the build's version is among it.
    "engine.receipts": ("engine.core", "engine.load", "engine.runtime", ""),
    "engine.wire": _BELOW_FACES,
    "engine.differences": (*_BELOW_FACES, "engine.wire"),
    "engine.door": ("engine.core", "engine.features", "engine.load"),
    "engine.engine": (*_BELOW_FACES, "engine.door", "engine.runtime", "engine.receipts"),
    **dict.fromkeys(_CLIENT, (*_BELOW_FACES, *_CLIENT, *_WIRE, "engine.runtime", "engine.engine")),
    **dict.fromkeys(
        _FACES,
        (*_BELOW_FACES, *_CLIENT, "engine.engine", "engine.load", "engine.receipts", "engine.wire"),
    ),
    # The manifest names the version; LLM.batch() is a face on a face.
    "engine.batch": (*_BELOW_FACES, "engine.engine", "engine.load", "engine.receipts", ""),
    "engine.llm": (
        *_BELOW_FACES,
        "engine.engine",
        "engine.load",
        "engine.receipts",
        "engine.batch",
    ),
    "engine.serve": (
        "engine.receipts",
        "engine.async_llm",
        "engine.batch",
        "engine.dialects",
        "engine.serve.settings",
        *_BELOW_FACES,
    ),
    "engine.serve.settings": ("engine.config", "engine.dialects"),
    "engine.tools": ("engine", "kernels", "quant"),
    "engine.bench": ("engine", "kernels", "quant"),
    "engine.commands": (*_FACES, "engine.serve", "engine.tools", ""),
    "engine.cli": ("engine.commands", "engine.tools", "engine.bench", ""),
    "": ("engine", "kernels.backend"),  # the front door names what it opens to
    "__main__": ("engine.cli",),
}
# tools and bench stand below the command and beside the server.
ABOVE_TOOLS = ("engine.cli", "engine.commands", "engine.serve")
# The server's options are data, as the engine's are: flags and errors are made from them.
BELOW_TOOLS = ("engine.serve.settings",)

# Third-party packages and the rooms or files that may import them. The standard library is free.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "numpy": (
        "engine.load",
        "engine.runtime",
        "engine.features",
        "engine.engine",
        "engine.llm",
        "engine.async_llm",
        "engine.serve",
        "engine.tools",
        "engine.bench",
        "kernels",
        "quant",
    ),
    "torch": ("kernels.reference", "kernels.triton", "quant.calibrate", "engine.bench.gpu"),
    "triton": ("kernels.triton", "engine.bench.gpu"),
    "tokenizers": ("engine.load",),
    "sentencepiece": ("engine.load",),
    "jinja2": ("engine.load",),
    "markupsafe": ("engine.load",),
    "huggingface_hub": ("engine.load.source",),
    "httptools": ("engine.bench.serve",),
    "llguidance": ("engine.features.grammar",),
    "msgspec": ("engine.wire", "engine.serve", *_CLIENT),
    "opentelemetry": ("engine.serve.tracing",),
    "pyarrow": ("engine.batch",),
    "tqdm": ("engine.llm", "engine.batch", "engine.tools"),
    "prometheus_client": ("engine.serve",),
    "pynvml": ("engine.account.nvml",),
    "starlette": ("engine.serve",),
    "uvicorn": ("engine.serve",),
}
NOT_HERE = {"numpy": ("kernels.ops", "engine.core", "engine.models")}

# Imports inside functions: the commands' late ones and the front door's, optional packages, and the
# doors to torch.
LOCAL_ANYTHING = ("engine.cli", "engine.commands")
LOCAL_OURS = {
    "kernels.choose": (
        "engineroom.kernels.reference",
        "engineroom.kernels.cpu.backend",
        "engineroom.kernels.triton",
    ),
    # The doctor must be able to say that the native module is missing.
    "engine.tools.doctor": ("engineroom.kernels.cpu", "engineroom.engine.tools.selfcheck"),
}
# tokenizers and sentencepiece: a checkpoint needs one of the two, and each costs a cold start.
# llguidance: for structured output alone. opentelemetry: where traces are asked for.
# tqdm: shown only at a terminal.
# readline and resource: not on every platform.
LOCAL_THIRD_PARTY = (
    "huggingface_hub",
    "opentelemetry",
    "torch",
    "readline",
    "resource",
    "importlib",
    "llguidance",
    "tokenizers",
    "sentencepiece",
    "tqdm",
    "pyarrow",
    "pynvml",
)


def violations(root: Path) -> list[str]:
    files = package_files(root)
    found = []
    for name, path in files.items():
        for imported in imports(name, path, set(files)):
            why = _refused(name, imported)
            if why:
                where = f"{path.relative_to(root)}:{imported.line}"
                found.append(f"{where}: imports {imported.module}: {why}")
    return found


def _refused(name: str, imported: Import) -> str:
    top = imported.module.split(".")[0]
    if top in ("tests", "examples", "benchmarks"):
        return "nobody imports tests, examples or benchmarks"
    if top in ("engine", "kernels", "quant"):
        return "a room is imported as engineroom.<room>"
    local = _refused_local(name, imported, top) if imported.local else ""
    if local:
        return local
    if top == "engineroom":
        return _refused_ours(name, imported.module.removeprefix("engineroom").lstrip("."))
    if top in sys.stdlib_module_names:
        return ""
    if not _within(name, THIRD_PARTY.get(top, ())) or _within(name, NOT_HERE.get(top, ())):
        return f"{_room(name) or 'the front door'} may not use {top}"
    return ""


def _refused_ours(name: str, target: str) -> str:
    room = _room(name)
    if target not in ALLOWED and not any(target.startswith(known + ".") for known in ALLOWED):
        return f"{target} is in no room of the table"
    if _room(target) == room:
        return ""
    above = _within(target, ABOVE_TOOLS) and not _within(target, BELOW_TOOLS)
    if room in ("engine.tools", "engine.bench") and above:
        return f"{room} stands below {_room(target)}"
    if _within(target, ALLOWED[room]):
        return ""
    return f"{room or 'the front door'} may import {', '.join(ALLOWED[room]) or 'only itself'}"


def _refused_local(name: str, imported: Import, top: str) -> str:
    if name == "" or _within(name, LOCAL_ANYTHING) or top in LOCAL_THIRD_PARTY:
        return ""
    if imported.module in LOCAL_OURS.get(name, ()):
        return ""
    return "an import inside a function is for optional packages and for the command"


def _room(name: str) -> str:
    rooms = [room for room in ALLOWED if room and (name == room or name.startswith(room + "."))]
    if not rooms and name not in ALLOWED:
        raise AssertionError(f"{name} is in no room of the table: give it one, or move it")
    return max(rooms, key=len, default="")


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == p or (p != "" and name.startswith(p + ".")) for p in prefixes)


def test_the_table_holds() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


def circles(root: Path) -> list[str]:
    """Modules that import each other, round any number of corners, imports for types included.

    The front door is not a step of the way: what it names is imported when it is touched. Imports
    inside functions are left out as well; the table above names each of those.
    """
    files = package_files(root)
    below: dict[str, set[str]] = {}
    for name, path in files.items():
        found = [i.module for i in imports(name, path, set(files)) if not i.local]
        ours = {m.removeprefix("engineroom.") for m in found if m.startswith("engineroom.")}
        below[name] = ours & set(files)
    order = TopologicalSorter({name: below[name] for name in files if name})
    try:
        order.prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        planted = tmp_path / "kernels" / f"{name}.py"
        planted.parent.mkdir(exist_ok=True)
        planted.write_text(f"if TYPE_CHECKING:\n    from .{other} import x\n", encoding="utf-8")
    (circle,) = circles(tmp_path)
    assert {"kernels.a", "kernels.b", "kernels.c"} == set(circle.split(" <- "))


def test_examples_use_the_front_door_alone() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        for imported in imports("example", path, set()):
            top = imported.module.split(".")[0]
            door = ("engineroom", "openai")  # or the server's, by its clients' package
            assert imported.module in door or top in sys.stdlib_module_names, (
                f"{path.name}:{imported.line} imports {imported.module}"
            )


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("engine/core/x.py", "import numpy", "engine.core may not use numpy"),
        ("engine/core/x.py", "from ..load import gguf", "engine.core may import only itself"),
        ("engine/core/x.py", "from .. import load", "engine.core may import only itself"),
        ("engine/models/x.py", "from ...kernels.choose import choose", "engine.models may import"),
        ("engine/models/x.py", "import numpy as np", "engine.models may not use numpy"),
        ("engine/runtime/x.py", "import torch", "engine.runtime may not use torch"),
        ("engine/runtime/x.py", "import torch.nn", "engine.runtime may not use torch"),
        ("kernels/ops.py", "import numpy", "may not use numpy"),
        ("kernels/x.py", "from engineroom.engine import config", "kernels may import only itself"),
        ("quant/x.py", "from ..kernels.choose import create", "quant may import"),
        ("engine/load/x.py", "def f():\n    from ..config import parse_bytes", "inside a function"),
        ("engine/load/x.py", "import requests", "engine.load may not use requests"),
        ("engine/load/x.py", "import tests.data", "nobody imports tests"),
        ("engine/load/x.py", "import kernels.ops", "a room is imported as engineroom."),
        ("engine/tools/x.py", "from .. import cli", "engine.tools stands below engine.cli"),
        ("engine/tools/x.py", "from ..serve import app", "engine.tools stands below engine.serve"),
        ("engine/tools/x.py", "import starlette", "engine.tools may not use starlette"),
        ("engine/cli.py", "from .core.request import Request", "engine.cli may import"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, text: str, why: str) -> None:
    for known in (
        "engine/config.py",
        "engine/load/gguf.py",
        "engine/cli.py",
        "engine/serve/app.py",
        file,
    ):
        path = tmp_path / known
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / file).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert why in found[0]
    assert f"{file}:{2 if 'def' in text else 1}" in found[0]
