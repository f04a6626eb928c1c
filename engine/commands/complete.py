"""`engineroom complete`: a text continued; reads a pipe, writes a pipe."""

from __future__ import annotations

import argparse
import sys

from .common import model_flag, usage


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import COMPLETE_DEFAULTS, add_engine_flags, add_sampling_flags

    model_flag(parser)
    parser.add_argument(
        "prompt",
        nargs="?",
        help="the text to go on from; without it, or as -, it is read from standard input "
        "(one final newline is dropped)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object when it is done")
    parser.add_argument(
        "--receipt", metavar="FILE", help="append what `engineroom replay` repeats it from"
    )
    add_sampling_flags(parser, COMPLETE_DEFAULTS)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from ..tools.chat import statistics
    from ..tools.complete import stream_text
    from ..tools.options import COMPLETE_DEFAULTS, engine_config, sampling_params
    from ..tools.plain import dump, output_as_plain
    from ..tools.replay import append
    from ..tools.session import Session, ctrl_c, open_engine

    params = sampling_params(args, COMPLETE_DEFAULTS)
    if not args.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        return usage("--logprobs and --prompt-logprobs are shown with --json")
    prompt = args.prompt
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            return usage('no prompt: give one, as in `engineroom complete "Once upon a time"`')
        prompt = sys.stdin.read().removesuffix("\n")
    # One request at a time: a cache for more would take memory for nothing.
    engine = open_engine(engine_config(args, args.model, max_num_seqs=params.num_samples))
    try:
        session = Session(engine)
        with ctrl_c(session.interrupt):
            if args.json:
                outputs = list(session.run(prompt, params))
                dump(output_as_plain(outputs[-1], args.model), sys.stdout)
            else:
                outputs = [stream_text(session, prompt, params, sys.stdout)]
                if sys.stdout.isatty() and sys.stderr.isatty():
                    print(statistics(outputs[-1]), file=sys.stderr)
        if any(c.finish_reason == "abort" for c in outputs[-1].outputs):
            return 130
        if args.receipt is not None:
            append(args.receipt, engine.receipt(outputs[-1], params))
        return 0
    finally:
        engine.close()


__all__ = ["configure", "run"]
