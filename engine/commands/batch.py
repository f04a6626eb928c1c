"""`engineroom batch`: files of requests; run, status, verify."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .common import model_flag, verbose_flag


def configure(parser: argparse.ArgumentParser) -> None:
    from ..batch import BATCH_DEFAULTS, FORMATS
    from ..tools.options import add_engine_flags, add_sampling_flags

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run = actions.add_parser("run", help="answer the input's lines, or go on with it")
    run.add_argument("inputs", nargs="+", metavar="INPUT", help="a file; - is standard input")
    run.add_argument("-o", "--output", required=True, help="the file of answers")
    model_flag(run)
    run.add_argument(
        "--format",
        choices=FORMATS,
        help="OpenAI's batch format, a prompt a line, or a table (default: by the file's name, "
        "else jsonl)",
    )
    run.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help='of a table, the prompt of a row: "Summarise: {text}" has the column text',
    )
    run.add_argument("--system-template", metavar="TEXT", help="with --chat, the system's message")
    run.add_argument("--id-column", metavar="NAME", help="of a table, what names a row's answer")
    run.add_argument(
        "--chat", action="store_true", help="prompts are a user's messages, by the chat template"
    )
    run.add_argument(
        "--on-error",
        choices=("stop", "record"),
        default="stop",
        help="what becomes of a bad line or a refused request (default: %(default)s)",
    )
    run.add_argument(
        "--max-cost",
        type=float,
        metavar="AMOUNT",
        help="begin nothing that would bring the batch above it, and stop",
    )
    run.add_argument(
        "--deadline", metavar="WHEN", help="stop then: after 90s or 1h30m, or at an ISO 8601 time"
    )
    run.add_argument("--restart", action="store_true", help="drop the journal and the output")
    run.add_argument(
        "--receipts", action="store_true", help="put into each answer what `replay` repeats it from"
    )
    add_sampling_flags(run, BATCH_DEFAULTS)
    add_engine_flags(run)
    status = actions.add_parser("status", help="how far a batch is")
    verify = actions.add_parser("verify", help="check a batch's journal and output")
    for action in (status, verify):
        action.add_argument("output", metavar="OUTPUT", help="the file of answers")
    for action in (run, status, verify):
        verbose_flag(action)
        action.add_argument("--json", action="store_true", help="the result as JSON")
        action.set_defaults(flags=[f for f in action._option_string_actions if len(f) > 2])


def run(args: argparse.Namespace) -> int:
    from ..batch import Interrupted, status, verify
    from ..tools.plain import dump

    if args.action == "run":
        try:
            report: Any = _run_batch(args)
        except Interrupted as leaving:
            print(f"stopped. {status(args.output)}", file=sys.stderr)
            return 128 + leaving.signal
    else:
        report = {"status": status, "verify": verify}[args.action](args.output)
    if args.json:
        dump(report.as_plain(), sys.stdout)
    else:
        print(report)
    return 0


def _run_batch(args: argparse.Namespace) -> Any:
    from ..batch import BATCH_DEFAULTS, Limits, Prompting, run, signals
    from ..batch.manifest import engine_facts
    from ..tools.options import engine_config, sampling_params
    from ..tools.session import open_engine

    params = sampling_params(args, BATCH_DEFAULTS)
    limits = Limits(max_cost=args.max_cost, deadline=args.deadline)
    engine = open_engine(engine_config(args, args.model))
    try:
        with signals() as check:
            return run(
                engine,
                args.inputs,
                args.output,
                model=engine_facts(engine),
                also_called=[args.model],
                format=args.format,
                prompting=Prompting(
                    args.prompt_template, args.system_template, args.id_column, args.chat
                ),
                params=params,
                on_error=args.on_error,
                restart=args.restart,
                limits=limits,
                check=check,
                receipts=engine.receipt if args.receipts else None,
            )
    finally:
        engine.close()


__all__ = ["configure", "run"]
