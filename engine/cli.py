"""The `engineroom` command: arguments in, a tool called, an exit status out. Imports late."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

_DEFAULT_MODEL = "smollm2"


class _Command(NamedTuple):
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is one of docs/errors.md. Never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Text in this terminal's encoding; what it cannot show becomes "?", not a traceback.
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        sys.stderr.reconfigure(errors="replace")  # type: ignore[union-attr]
    verbose = bool(os.environ.get("ENGINEROOM_DEBUG"))
    try:
        command = next((a for a in arguments if not a.startswith("-")), None)
        if command is not None and command not in _COMMANDS:
            return _usage(_unknown_command(command))
        args, unknown = _parser(arguments).parse_known_args(arguments)
        if unknown:
            return _usage(_unknown_argument(args, unknown[0]))
        verbose = verbose or args.verbose
        if args.command is None:
            _parser([]).print_help()
            return 0
        status = _COMMANDS[args.command].run(args)
        sys.stdout.flush()  # so that a reader who went away is noticed here
        return status
    except SystemExit as leaving:  # argparse: --help, --version, or a usage error that it printed
        return leaving.code if isinstance(leaving.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _report(error, verbose)


def _report(error: Exception, verbose: bool) -> int:
    from .tools.errors import find

    row = find(error)
    text = str(error) or type(error).__name__
    if row.code == "E-INTERNAL-01":
        text = f"{type(error).__name__}: {text}\nThis is a bug of engineroom. {row.mend[0].upper()}"
        text += f"{row.mend[1:]}."
    if verbose:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    lines = text.splitlines()
    if len(lines) > 20 and not verbose:
        lines = [*lines[:20], f"({len(lines) - 20} more lines with -v)"]
    note = "" if verbose else ", traceback: -v"
    print(f"engineroom: {row.code}  " + "\n".join(lines), file=sys.stderr)
    print(f"(docs/errors.md#{row.code.lower()}{note})", file=sys.stderr)
    return row.exit_status


# -------------------------------------------------------------------------------------- arguments


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only a command that is named gets its flags: they cost imports."""
    parser = _Parser(
        prog="engineroom",
        description="Run a language model on this machine.",
        epilog="Each command has its own --help. Exit statuses: docs/errors.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.summary, description=command.summary + ".", allow_abbrev=False
        )
        _verbose_flag(sub)
        if name in arguments:
            command.configure(sub)
            sub.set_defaults(flags=[flag for flag in sub._option_string_actions if len(flag) > 2])
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(_usage(f"{message} (`{self.prog} --help` lists what there is)"))


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _unknown_command(command: str) -> str:
    hint = _did_you_mean(command, _COMMANDS)
    return f"unknown command {command!r}{hint} (known: {', '.join(_COMMANDS)})"


def _unknown_argument(args: argparse.Namespace, argument: str) -> str:
    flag = argument.partition("=")[0]
    hint = _did_you_mean(flag, getattr(args, "flags", ()))
    command = f" {args.command}" if args.command else ""
    return f"unknown argument {flag!r}{hint} (`engineroom{command} --help` lists them)"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from engineroom import __version__

        print(f"engineroom {__version__}")
        parser.exit(0)


def _verbose_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show tracebacks and what loading does",
    )


def _model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=_DEFAULT_MODEL,
        help="a folder, a .gguf file, a short name or a Hugging Face id (default: %(default)s)",
    )


def _colour() -> bool:
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


# ------------------------------------------------------------------------------------------- chat


def _configure_chat(parser: argparse.ArgumentParser) -> None:
    from .tools.options import CHAT_DEFAULTS, add_engine_flags, add_sampling_flags

    _model_flag(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_flags(parser, CHAT_DEFAULTS)
    add_engine_flags(parser)


def _chat(args: argparse.Namespace) -> int:
    from .tools.chat import Conversation, form_of, statistics
    from .tools.options import CHAT_DEFAULTS, engine_config, sampling_params
    from .tools.session import Session, open_engine

    params = sampling_params(args, CHAT_DEFAULTS)
    if params.num_samples > 1 or params.logprobs is not None or params.prompt_logprobs is not None:
        return _usage("chat shows one answer; for --n, --best-of and logprobs use `complete`")
    engine = open_engine(engine_config(args, args.model, max_num_seqs=1))
    try:
        template = engine.loaded.require_chat_template().source
        interactive = args.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
        conversation = Conversation(
            Session(engine),
            params,
            system=args.system,
            interactive=interactive,
            colour=_colour(),
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


# --------------------------------------------------------------------------------------- complete


def _configure_complete(parser: argparse.ArgumentParser) -> None:
    from .tools.options import COMPLETE_DEFAULTS, add_engine_flags, add_sampling_flags

    _model_flag(parser)
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


def _complete(args: argparse.Namespace) -> int:
    from .tools.chat import statistics
    from .tools.complete import stream_text
    from .tools.options import COMPLETE_DEFAULTS, engine_config, sampling_params
    from .tools.plain import dump, output_as_plain
    from .tools.replay import append
    from .tools.session import Session, ctrl_c, open_engine

    params = sampling_params(args, COMPLETE_DEFAULTS)
    if not args.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        return _usage("--logprobs and --prompt-logprobs are shown with --json")
    prompt = args.prompt
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            return _usage('no prompt: give one, as in `engineroom complete "Once upon a time"`')
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


# ----------------------------------------------------------------------------------------- replay


def _configure_replay(parser: argparse.ArgumentParser) -> None:
    from .tools.options import add_engine_flags, count

    parser.add_argument(
        "receipts", nargs="+", metavar="RECEIPT", help="a file of receipts, or a batch's output"
    )
    _model_flag(parser)
    parser.add_argument(
        "--beside",
        type=count,
        default=0,
        metavar="N",
        help="random requests that run at the same time (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    add_engine_flags(parser)


def _replay(args: argparse.Namespace) -> int:
    from .tools.options import engine_config
    from .tools.plain import dump
    from .tools.replay import options, read_receipts, replay
    from .tools.session import open_engine

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


# ------------------------------------------------------------------------- inspect, doctor, models


def _configure_inspect(parser: argparse.ArgumentParser) -> None:
    from .tools.options import add_engine_flags

    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--measure", action="store_true", help="measure and keep the loss of each quantization"
    )
    add_engine_flags(parser)


def _inspect(args: argparse.Namespace) -> int:
    from .tools.choices import measure
    from .tools.inspect import inspect_model, render
    from .tools.options import engine_config
    from .tools.plain import dump

    config = engine_config(args, args.model)
    if args.measure:
        measure(config)
    report = inspect_model(config)
    if args.json:
        dump(report, sys.stdout)
    else:
        print(render(report))
    return 0 if report["fits"] else 5


def _configure_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quant",
        action="store_true",
        help="check each kernel of each weight format instead, against its specification",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _doctor(args: argparse.Namespace) -> int:
    from .tools.doctor import examine, exit_status, render
    from .tools.plain import dump

    if args.quant:
        return _doctor_quant(args)
    report = examine()
    if args.json:
        dump(report, sys.stdout)
    else:
        print(render(report))
    return exit_status(report)


def _doctor_quant(args: argparse.Namespace) -> int:
    from .tools.plain import dump
    from .tools.quantcheck import check_formats, render

    rows = check_formats()
    if args.json:
        dump({"kernels": rows}, sys.stdout)
    else:
        print(render(rows))
    return 0 if all(row["passed"] for row in rows) else 9


def _configure_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fetch", metavar="NAME", help="bring a model of the catalogue here")
    parser.add_argument(
        "--accept-terms", action="store_true", help="with --fetch: accept the model's own terms"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the fetched files and compare their sums"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def _models(args: argparse.Namespace) -> int:
    from .tools.models import fetch_model, list_models, render
    from .tools.plain import dump

    if args.fetch is not None:
        path = fetch_model(args.fetch, accept_terms=args.accept_terms, progress=sys.stderr)
        if args.json:
            dump({"name": args.fetch, "path": str(path)}, sys.stdout)
        elif sys.stdout.isatty():
            print(path)
        return 0
    if args.accept_terms:
        return _usage("--accept-terms goes with --fetch NAME")
    report = list_models(verify=args.verify)
    if args.json:
        dump(report, sys.stdout)
    else:
        print(render(report))
    return 0 if all(m["verified"] is not False for m in report["models"]) else 3


# ------------------------------------------------------------------------------------------- eval


def _configure_eval(parser: argparse.ArgumentParser) -> None:
    from .tools.evaluate import AGAINST_OPTIONS
    from .tools.options import add_engine_flags, count

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


def _eval(args: argparse.Namespace) -> int:
    from .tools.evaluate import against_config, evaluate, render
    from .tools.measured import save
    from .tools.options import engine_config
    from .tools.plain import dump
    from .tools.texts import evaluation_text

    config = engine_config(args, args.model)
    against = against_config(config, vars(args))
    text = evaluation_text(args.text)
    report = evaluate(config, against, text, context=args.context, most_chunks=args.chunks)
    if args.keep:
        save(report)
    if args.json:
        dump(report, sys.stdout)
    else:
        print(render(report))
    return 0


# --------------------------------------------------------------------------------------- quantize


def _configure_quantize(parser: argparse.ArgumentParser) -> None:
    from .tools.options import count
    from .tools.quantize import FORMATS

    parser.add_argument(
        "model", help="a folder of 16-bit safetensors; of a GGUF format, a GGUF file"
    )
    parser.add_argument("-o", "--out", required=True, help="the folder, or the file, to make")
    parser.add_argument(
        "--method",
        choices=("rtn", "gptq", "awq", "imatrix"),
        help="round to nearest, GPTQ or AWQ; rtn or imatrix of a GGUF format "
        "(default: gptq of W4A16, imatrix of Q4_0, Q4_K and Q6_K, else rtn)",
    )
    parser.add_argument("--format", choices=FORMATS, default="W4A16", help="(default: %(default)s)")
    parser.add_argument("--group-size", type=count, metavar="N", help="columns that share a scale")
    parser.add_argument("--text", metavar="FILE", help="the text to calibrate with, UTF-8")
    parser.add_argument("--samples", type=count, default=32, help="runs of the text (32)")
    parser.add_argument("--context", type=count, default=512, help="tokens of one (512)")
    parser.add_argument("--device", default="auto", help="what runs the model (auto)")
    parser.add_argument("--threads", type=count, metavar="N", help="CPU threads")
    parser.add_argument("--restart", action="store_true", help="drop what an earlier run kept")
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def _quantize(args: argparse.Namespace) -> int:
    from .tools.plain import dump
    from .tools.quantize import DEFAULT_METHODS, QuantizeConfig, quantize, render
    from .tools.quantize_gguf import quantize_gguf
    from .tools.texts import calibration_text

    names = ("model", "out", "method", "format", "group_size", "samples", "context", "device")
    args.method = args.method or DEFAULT_METHODS.get(args.format, "rtn")
    config = QuantizeConfig(**{n: getattr(args, n) for n in (*names, "threads")})
    text = calibration_text(args.text)
    if config.format.startswith("Q"):
        report = quantize_gguf(config, text)
    else:
        report = quantize(config, text, restart=args.restart)
    if args.json:
        dump(report, sys.stdout)
    else:
        print(render(report))
    return 0


# ------------------------------------------------------------------------------------------ bench


def _configure_bench(parser: argparse.ArgumentParser) -> None:
    from .bench.command import configure

    configure(parser)


def _bench(args: argparse.Namespace) -> int:
    from .bench.command import run

    return run(args)


# ------------------------------------------------------------------------------------------ batch


def _configure_batch(parser: argparse.ArgumentParser) -> None:
    from .batch import BATCH_DEFAULTS, FORMATS
    from .tools.options import add_engine_flags, add_sampling_flags

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    run = actions.add_parser("run", help="answer the input's lines, or go on with it")
    run.add_argument("inputs", nargs="+", metavar="INPUT", help="a file; - is standard input")
    run.add_argument("-o", "--output", required=True, help="the file of answers")
    _model_flag(run)
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
        _verbose_flag(action)
        action.add_argument("--json", action="store_true", help="the result as JSON")
        action.set_defaults(flags=[f for f in action._option_string_actions if len(f) > 2])


def _batch(args: argparse.Namespace) -> int:
    from .batch import Interrupted, status, verify
    from .tools.plain import dump

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
    from .batch import BATCH_DEFAULTS, Limits, Prompting, run, signals
    from .batch.manifest import engine_facts
    from .tools.options import engine_config, sampling_params
    from .tools.session import open_engine

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


# ------------------------------------------------------------------------------------------ serve


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    from .tools.options import add_engine_flags, add_serve_flags

    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    add_serve_flags(parser)
    add_engine_flags(parser)


def _serve(args: argparse.Namespace) -> int:
    from engineroom import __version__

    from .tools.options import engine_config, serve_config

    try:
        from .serve.server import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "engineroom":
            raise
        return _usage(
            f"the server needs the package {error.name}, which is not installed here; "
            "pip install 'engineroom[serve]' brings it",
            "E-SERVE-02",
        )
    return serve(engine_config(args, args.model), serve_config(args), version=__version__)


def _usage(message: str, code: str = "E-USAGE-01") -> int:
    print(f"engineroom: {code}  {message}", file=sys.stderr)
    return 2


_COMMANDS = {
    "chat": _Command("A conversation in the terminal", _configure_chat, _chat),
    "complete": _Command("Continue a text; pipes in and out", _configure_complete, _complete),
    "replay": _Command(
        "Compute receipts again and name the first difference", _configure_replay, _replay
    ),
    "serve": _Command(
        "A server that speaks OpenAI's and Anthropic's interfaces, over HTTP",
        _configure_serve,
        _serve,
    ),
    "batch": _Command("Files of requests, answered without losing any", _configure_batch, _batch),
    "inspect": _Command(
        "What a model is and whether it fits here, from its headers", _configure_inspect, _inspect
    ),
    "doctor": _Command("This machine, the backends, and a self-check", _configure_doctor, _doctor),
    "eval": _Command(
        "Perplexity, and the distance from another model or from 16 bits", _configure_eval, _eval
    ),
    "quantize": _Command(
        "Make a smaller checkpoint: rounded to nearest, or calibrated by GPTQ or AWQ",
        _configure_quantize,
        _quantize,
    ),
    "models": _Command("Short names and supported architectures", _configure_models, _models),
    "bench": _Command(
        "Measure a model, or kernels beside what this machine allows", _configure_bench, _bench
    ),
}

if __name__ == "__main__":
    sys.exit(main())
