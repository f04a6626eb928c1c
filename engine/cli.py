"""The `engineroom` command: arguments in, a command of engine/commands run, an exit status out."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .commands.common import usage, verbose_flag

# A command's summary, and its file, which is imported where the command is named.
_COMMANDS = {
    "chat": ("A conversation in the terminal", "commands.chat"),
    "complete": ("Continue a text; pipes in and out", "commands.complete"),
    "replay": ("Compute receipts again and name the first difference", "commands.replay"),
    "serve": (
        "A server that speaks OpenAI's and Anthropic's interfaces, over HTTP",
        "commands.serve",
    ),
    "batch": ("Files of requests, answered without losing any", "commands.batch"),
    "inspect": ("What a model is and whether it fits here, from its headers", "commands.inspect"),
    "doctor": ("This machine, the backends, and a self-check", "commands.doctor"),
    "eval": ("Perplexity, and the distance from another model or from 16 bits", "commands.eval"),
    "quantize": (
        "Make a smaller checkpoint: rounded to nearest, or calibrated by GPTQ or AWQ",
        "commands.quantize",
    ),
    "models": ("Short names and supported architectures", "commands.models"),
    "bench": ("Measure a model, or kernels beside what this machine allows", "bench.command"),
}


def _command(name: str) -> Any:
    """The module of a command: its configure(parser) and run(arguments)."""
    return importlib.import_module(f".{_COMMANDS[name][1]}", __package__)


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
            return usage(_unknown_command(command))
        args, unknown = _parser(arguments).parse_known_args(arguments)
        if unknown:
            return usage(_unknown_argument(args, unknown[0]))
        verbose = verbose or args.verbose
        if args.command is None:
            _parser([]).print_help()
            return 0
        status: int = _command(args.command).run(args)
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
    for name, (summary, _) in _COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary + ".", allow_abbrev=False)
        verbose_flag(sub)
        if name in arguments:
            _command(name).configure(sub)
            sub.set_defaults(flags=[flag for flag in sub._option_string_actions if len(flag) > 2])
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(usage(f"{message} (`{self.prog} --help` lists what there is)"))


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


if __name__ == "__main__":
    sys.exit(main())
