"""`engineroom eval`: perplexity, and the distance between two models."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.evaluate import AGAINST_OPTIONS
    from ..tools.options import add_engine_flags, count

    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    parser.add_argument("--against", metavar="MODEL", help="compare to this model's predictions")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text; default: see docs")
    parser.add_argument("--context", type=count, default=512, help="tokens of a chunk (512)")
    parser.add_argument("--chunks", type=count, metavar="N", help="score only the first N chunks")
    parser.add_argument("--keep", action="store_true", help="keep the result for `inspect`")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    for name in AGAINST_OPTIONS:
        flag = "--against-" + name.replace("_", "-")
        parser.add_argument(
            flag,
            dest=f"against_{name}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{name} of the other; without --against the other is the model itself",
        )
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from ..tools.evaluate import against_config, evaluate, render
    from ..tools.measured import save
    from ..tools.options import engine_config
    from ..tools.plain import tell
    from ..tools.texts import evaluation_text

    config = engine_config(args, args.model)
    against = against_config(config, vars(args))
    text = evaluation_text(args.text)
    report = evaluate(config, against, text, context=args.context, most_chunks=args.chunks)
    if args.keep:
        save(report)
    tell(report, render, as_json=args.json)
    return 0


__all__ = ["configure", "run"]
