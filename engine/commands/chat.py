"""`engineroom chat`: a conversation in the terminal, or one answer."""

from __future__ import annotations

import argparse
import sys

from .common import colour, model_flag, usage


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import CHAT_DEFAULTS, add_engine_flags, add_sampling_flags

    model_flag(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_flags(parser, CHAT_DEFAULTS)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    from ..tools.chat import Conversation, form_of, statistics
    from ..tools.options import CHAT_DEFAULTS, engine_config, sampling_params
    from ..tools.session import Session, open_engine

    params = sampling_params(args, CHAT_DEFAULTS)
    if params.num_samples > 1 or params.logprobs is not None or params.prompt_logprobs is not None:
        return usage("chat shows one answer; for --n, --best-of and logprobs use `complete`")
    engine = open_engine(engine_config(args, args.model, max_num_seqs=1))
    try:
        template = engine.loaded.require_chat_template().source
        interactive = args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
        conversation = Conversation(
            Session(engine),
            params,
            system=args.system,
            interactive=interactive,
            colour=colour(),
            form=form_of(template),
        )
        if args.prompt is not None:
            output = conversation.ask(args.prompt)
            if sys.stderr.isatty():
                print(statistics(output), file=sys.stderr)
            return 130 if output.outputs[0].finish_reason == "abort" else 0
        if interactive:
            conversation.say(f"{args.model} · /help lists the commands, Ctrl-D leaves")
        conversation.loop(sys.stdin)
        return 0
    finally:
        engine.close()


__all__ = ["configure", "run"]
