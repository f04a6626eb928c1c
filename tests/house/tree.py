"""The repository as the house tests read it: its files, their modules, their imports by AST."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("engine", "kernels", "quant")


@dataclass(frozen=True)
class Import:
    """One imported module. `local`: written inside a function."""

    module: str
    line: int
    local: bool


def package_files(root: Path = ROOT) -> dict[str, Path]:
    """Module name below engineroom ("" for the front door, "engine.cli", ...) -> file."""
    files = {}
    front = root / "src" / "engineroom"
    for path in sorted(front.glob("*.py")):
        files["" if path.stem == "__init__" else path.stem] = path
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    """Every import of a file, relative ones resolved; ours begin with "engineroom".

    `from x import y` gives x.y where that is a module of ours (in `known`), else x.
    """
    known = known | {".".join(k.split(".")[:n]) for k in known for n in range(1, k.count(".") + 1)}
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = ["engineroom", *name.split(".")] if name else ["engineroom"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node, local in _walk(tree, False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, local)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join(package[: len(package) - node.level + 1])
                base += f".{node.module}" if node.module else ""
            else:
                base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                ours = inner.removeprefix("engineroom.") in known and base.startswith("engineroom")
                yield Import(inner if ours else base, node.lineno, local)


def _walk(node: ast.AST, local: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, local
        inside = local or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, inside)
