"""`engineroom models`: short names, fetched and verified."""

from __future__ import annotations

import argparse
import sys

from .common import usage


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fetch", metavar="NAME", help="bring a model of the catalogue here")
    parser.add_argument(
        "--accept-terms", action="store_true", help="with --fetch: accept the model's own terms"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the fetched files and compare their sums"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    from ..tools.models import fetch_model, list_models, render
    from ..tools.plain import dump, tell

    if args.fetch is not None:
        path = fetch_model(args.fetch, accept_terms=args.accept_terms, progress=sys.stderr)
        if args.json:
            dump({"name": args.fetch, "path": str(path)}, sys.stdout)
        elif sys.stdout.isatty():
            print(path)
        return 0
    if args.accept_terms:
        return usage("--accept-terms goes with --fetch NAME")
    report = list_models(verify=args.verify)
    tell(report, render, as_json=args.json)
    return 0 if all(m["verified"] is not False for m in report["models"]) else 3


__all__ = ["configure", "run"]
