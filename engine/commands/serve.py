"""`engineroom serve`: the server over HTTP."""

from __future__ import annotations

import argparse

from .common import usage


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import add_engine_flags, add_serve_flags

    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    add_serve_flags(parser)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from engineroom import __version__

    from ..tools.options import engine_config, serve_config

    try:
        from ..serve.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "engineroom":
            raise
        return usage(
            f"the server needs the package {error.name}, which is not installed here; "
            "pip install 'engineroom[serve]' brings it",
            "E-SERVE-02",
        )
    return serve(engine_config(args, args.model), serve_config(args), version=__version__)


__all__ = ["configure", "run"]
