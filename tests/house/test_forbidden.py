"""What no file of the package may do: load code from data, or start a shell. By AST, no exceptions.

Every entry is how another engine was taken over: unpickling, evaluating strings, torch.load, or a
template environment without the sandbox.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .tree import ROOT, package_files

MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "diskcache",
    "joblib",
    "runpy",
    "code",
    "codeop",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# (what it is called on, name); None: on anything.
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("torch.serialization", "load"),
    ("torch.package", "PackageImporter"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("jinja2", "Environment"),
    ("jinja2", "Template"),
    ("jinja2.environment", "Environment"),
    ("jinja2.environment", "Template"),
    ("jinja2.nativetypes", "NativeEnvironment"),
    ("jinja2.nativetypes", "NativeTemplate"),
    ("os", "system"),
    ("os", "popen"),
    ("subprocess", "getoutput"),
    ("subprocess", "getstatusoutput"),
    ("builtins", "eval"),
    ("builtins", "exec"),
}
KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}  # given as anything but False


def forbidden(source: str, name: str) -> Iterator[str]:
    tree = ast.parse(source, name)
    known: dict[str, str] = {}  # a name in this file -> the dotted name it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
                if top in MODULES:
                    yield f"{name}:{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            for alias in node.names:
                known[alias.asname or alias.name] = f"{module}.{alias.name}"
                if module.split(".")[0] in MODULES or (module, alias.name) in ATTRIBUTES:
                    yield f"{name}:{node.lineno}: from {module} import {alias.name}"
    typed = _annotations(tree)  # naming a type is not using it
    for node in ast.walk(tree):
        if node in typed:
            continue
        if isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in known:
            yield f"{name}:{node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute):
            base = _dotted(node.value, known)
            if (base, node.attr) in ATTRIBUTES:
                yield f"{name}:{node.lineno}: {base}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield f"{name}:{node.value.lineno}: {node.arg}="
        elif isinstance(node, ast.Call) and _dotted(node.func, known).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and str(first.value).split(".")[0] in MODULES:
                yield f"{name}:{node.lineno}: import_module({first.value!r})"


def _annotations(tree: ast.AST) -> set[ast.AST]:
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            if annotation is not None:
                found.update(ast.walk(annotation))
    return found


def _dotted(node: ast.AST, known: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    return ""


def test_no_file_does_any_of_it() -> None:
    files = [
        *package_files().values(),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    assert len(files) > 20
    found = [
        line
        for path in files
        for line in forbidden(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import dill as d",
        "from marshal import loads",
        "import shelve",
        "def f(x):\n    import cloudpickle",
        "eval('1')",
        "f = exec",
        "__import__('os')",
        "compile('1', '', 'eval')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nx = True\nnp.load('x', allow_pickle=x)",
        "import yaml\nyaml.load('x')",
        "from jinja2 import Environment",
        "import jinja2\njinja2.Template('x')",
        "import jinja2.nativetypes\njinja2.nativetypes.NativeEnvironment()",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "load(trust_remote_code=True)",
        "import importlib\nimportlib.import_module('pickle')",
    ],
)
def test_each_form_is_found(text: str) -> None:
    assert list(forbidden(text, "planted.py"))


@pytest.mark.parametrize(
    "text",
    [
        "import re\nre.compile('x')",
        "from re import compile\ncompile('x')",
        "import json\njson.load(f)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
        "import jinja2.sandbox\njinja2.sandbox.ImmutableSandboxedEnvironment()",
        "config(trust_remote_code=False)",
        "import jinja2\ndef f(t: jinja2.Template) -> jinja2.Template: return t",
    ],
)
def test_the_lawful_forms_pass(text: str) -> None:
    assert not list(forbidden(text, "planted.py"))


def test_every_file_says_what_it_owns() -> None:
    """The first line of each file is a docstring (empty __init__.py files own nothing)."""
    silent = [
        str(path.relative_to(ROOT))
        for path in _python_files()
        if (text := path.read_text(encoding="utf-8").strip())
        and ast.get_docstring(ast.parse(text)) is None
    ]
    assert not silent, silent


def _python_files() -> list[Path]:
    return [
        *package_files().values(),
        *(p for d in ("tests", "examples", "benchmarks") for p in (ROOT / d).rglob("*.py")),
    ]
