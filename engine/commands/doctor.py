"""`engineroom doctor`: this machine, the backends, a self-check."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quant",
        action="store_true",
        help="check each kernel of each weight format instead, against its specification",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    from ..tools.doctor import examine, exit_status, render
    from ..tools.plain import tell

    if args.quant:
        return _quant(args)
    report = examine()
    tell(report, render, as_json=args.json)
    return exit_status(report)


def _quant(args: argparse.Namespace) -> int:
    from ..tools.plain import tell
    from ..tools.quantcheck import check_formats, render

    rows = check_formats()
    tell({"kernels": rows}, lambda _: render(rows), as_json=args.json)
    return 0 if all(row["passed"] for row in rows) else 9


__all__ = ["configure", "run"]
