"""What several commands share: flags, and how wrong use is told."""

from __future__ import annotations

import argparse
import os
import sys

_DEFAULT_MODEL = "smollm2"


def verbose_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show tracebacks and what loading does",
    )


def model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=_DEFAULT_MODEL,
        help="a folder, a .gguf file, a short name or a Hugging Face id (default: %(default)s)",
    )


def colour() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def usage(message: str, code: str = "E-USAGE-01") -> int:
    print(f"engineroom: {code}  {message}", file=sys.stderr)
    return 2


__all__ = ["colour", "model_flag", "usage", "verbose_flag"]
