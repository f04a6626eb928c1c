"""`engineroom replay`: receipts computed again."""

from __future__ import annotations

import argparse
import sys

from .common import model_flag


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import add_engine_flags, count

    parser.add_argument(
        "receipts", nargs="+", metavar="RECEIPT", help="a file of receipts, or a batch's output"
    )
    model_flag(parser)
    parser.add_argument(
        "--beside",
        type=count,
        default=0,
        metavar="N",
        help="random requests that run at the same time (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from ..tools.options import engine_config
    from ..tools.plain import dump
    from ..tools.replay import options, read_receipts, replay
    from ..tools.session import open_engine

    receipts = read_receipts(args.receipts)
    engine = open_engine(engine_config(args, args.model, **options(receipts)))
    verdicts = []
    try:
        for verdict in replay(engine, receipts, beside=args.beside):
            verdicts.append(verdict)
            if verdict.difference is not None and not args.json:
                print(verdict)
    finally:
        engine.close()
    same = [v for v in verdicts if v.difference is None]
    if args.json:
        dump({"receipts": len(verdicts), "same": len(same), "verdicts": verdicts}, sys.stdout)
    else:
        print(f"{len(same)} of {len(verdicts)} receipts repeated to the last bit")
        for change in sorted({change for v in same for change in v.changes}):
            print(f"  though {change}")
    return 0 if len(same) == len(verdicts) else 11


__all__ = ["configure", "run"]
