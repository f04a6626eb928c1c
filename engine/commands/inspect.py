"""`engineroom inspect`: what a model is, from its headers."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import add_engine_flags

    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--measure", action="store_true", help="measure and keep the loss of each quantization"
    )
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from ..tools.choices import measure
    from ..tools.inspect import inspect_model, render
    from ..tools.options import engine_config
    from ..tools.plain import tell

    config = engine_config(args, args.model)
    if args.measure:
        measure(config)
    report = inspect_model(config)
    tell(report, render, as_json=args.json)
    return 0 if report["fits"] else 5


__all__ = ["configure", "run"]
