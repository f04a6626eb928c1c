"""`engineroom bench`: which benchmarks there are, their flags, and what runs each.

A benchmark is one entry of BENCHES. Its module is imported when it is asked for, so that one that
needs torch costs the others nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ...kernels.backend import BackendUnavailable
from ...kernels.choose import choose
from ..config import EngineConfig
from ..tools.options import add_engine_flags, engine_config
from .timing import Repeats

_INTERPRETED = "TRITON_INTERPRET"
_KINDS = ("json", "csv", "md", "html")  # of files; what writes them is imported late


class Bench(NamedTuple):
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def configure(parser: argparse.ArgumentParser) -> None:
    """A parser for each benchmark."""
    benches = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    for name, bench in BENCHES.items():
        sub = benches.add_parser(
            name, help=bench.summary, description=bench.summary + ".", allow_abbrev=False
        )
        bench.configure(sub)
        sub.set_defaults(flags=[flag for flag in sub._option_string_actions if len(flag) > 2])


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 2 where this machine lacks what it needs, with what to mend."""
    try:
        return BENCHES[args.bench].run(args)
    except BackendUnavailable as error:
        print(f"engineroom: bench {args.bench}: {error}", file=sys.stderr)
        return 2


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def _file_flags(parser: argparse.ArgumentParser) -> None:
    for kind in _KINDS:
        parser.add_argument(f"--{kind}", metavar="PATH", help=f"write the tables as {kind}")


def _files(args: argparse.Namespace) -> dict[str, str | None]:
    return {kind: getattr(args, kind) for kind in _KINDS}


# --------------------------------------------------------------------------------------------- gpu


def _configure_gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report", action="store_true", help="time every kernel too, and write report.md and .json"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=10.0,
        metavar="X",
        help="time to stay within; less means fewer repetitions (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="bench-gpu",
        metavar="DIR",
        help="folder of the report (default: %(default)s)",
    )
    parser.add_argument("-m", "--model", help="time this model too, as the engine loads it")
    parser.add_argument(
        "--rehearsal",
        action="store_true",
        help=f"with {_INTERPRETED}=1: tiny shapes on the CPU, to try the command; no times",
    )


def _need_card(rehearsal: bool) -> None:
    """Errors: BackendUnavailable where there is no card, or for a rehearsal no interpreter."""
    choice = choose("cuda")
    interpreted = "interpreter" in choice.reason
    if rehearsal != interpreted:
        raise BackendUnavailable(
            f"--rehearsal runs on Triton's interpreter: set {_INTERPRETED}=1"
            if rehearsal
            else f"{_INTERPRETED} is set, so nothing would run on a card; unset it, or try the "
            "command with --rehearsal"
        )


def _gpu(args: argparse.Namespace) -> int:
    _need_card(args.rehearsal)
    report = importlib.import_module(f"{__package__}.gpu.report")
    status: int = report.run(
        report=args.report,
        minutes=args.minutes,
        output=args.output,
        model=args.model,
        rehearsal=args.rehearsal,
    )
    return status


# ----------------------------------------------------------------------------------------- kernels


def _shape(text: str) -> tuple[int, int]:
    try:
        width, out_width = (int(part) for part in text.split("x"))
        if width > 0 and out_width > 0 and width % 32 == 0:
            return width, out_width
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not KxN such as 4096x14336, K a multiple of 32")


def _whole(text: str) -> int:
    if text.isdecimal() and 0 < int(text) <= 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 65536")


def _configure_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="KxN", help="of a linear layer"
    )
    parser.add_argument("--tokens", type=_whole, action="append", metavar="M", help="rows at once")
    parser.add_argument("--format", action="append", metavar="NAME", help="of the weights")
    parser.add_argument("--threads", type=_whole, metavar="N", help="default: the cores here")
    parser.add_argument(
        "--minutes",
        type=_minutes,
        default=3.0,
        metavar="X",
        help="time to stay within; less means fewer repetitions (default: %(default)s)",
    )
    _file_flags(parser)
    parser.add_argument(
        "--tune",
        action="store_true",
        help="on a GPU instead: write the table of this card's launch options of linear layers",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="with --tune: the table (default: CARD.json)"
    )
    parser.add_argument(
        "--rehearsal",
        action="store_true",
        help=f"with --tune and {_INTERPRETED}=1: tiny shapes on the CPU; no times",
    )


def _kernels(args: argparse.Namespace) -> int:
    alone = ("output", "rehearsal") if not args.tune else ("tokens", "threads", *_KINDS)
    if idle := [name for name in alone if getattr(args, name)]:
        raise BackendUnavailable(
            f"--{idle[0]} is for a run {'without' if args.tune else 'with'} --tune; leave it out"
        )
    if args.tune:
        _need_card(args.rehearsal)
        tune = importlib.import_module(f"{__package__}.gpu.tune")
        status: int = tune.run(
            minutes=args.minutes,
            output=args.output,
            shapes=args.shape,
            formats=args.format,
            rehearsal=args.rehearsal,
        )
        return status
    kernels = importlib.import_module(f"{__package__}.kernels")
    unknown = [name for name in args.format or () if name not in kernels.FORMATS_TIMED]
    if unknown:
        known = ", ".join(kernels.FORMATS_TIMED)
        raise BackendUnavailable(f"--format {unknown[0]} is not timed here; known: {known}")
    status = kernels.run(
        minutes=args.minutes,
        threads=args.threads,
        shapes=args.shape or kernels.SHAPES,
        tokens=args.tokens or kernels.TOKENS,
        formats=args.format or kernels.FORMATS_TIMED,
        paths=_files(args),
    )
    return status


# ------------------------------------------------------------------------------------ whole models


def _wholes(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


def _rounds(text: str) -> int:
    return 0 if text == "0" else _whole(text)


def _model_flags(parser: argparse.ArgumentParser, *, warmup: int, repetitions: int) -> None:
    parser.add_argument("model", help="a folder, a .gguf file, a short name or a Hugging Face id")
    parser.add_argument(
        "--warmup",
        type=_rounds,
        default=warmup,
        metavar="N",
        help="rounds of each row that are not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--repetitions",
        type=_whole,
        default=repetitions,
        metavar="N",
        help="rounds of each row that are counted (default: %(default)s)",
    )
    _file_flags(parser)
    add_engine_flags(parser)


def _list_flag(parser: argparse.ArgumentParser, name: str, default: str, what: str) -> None:
    parser.add_argument(
        name,
        type=_wholes,
        default=default,
        metavar="N,N",
        help=f"{what}, each measured (default: %(default)s)",
    )


def _configure_latency(parser: argparse.ArgumentParser) -> None:
    _list_flag(parser, "--input-len", "16,512", "random tokens of the prompt")
    _list_flag(parser, "--output-len", "128", "tokens of the answer")
    _model_flags(parser, warmup=2, repetitions=10)


def _configure_throughput(parser: argparse.ArgumentParser) -> None:
    _list_flag(parser, "--requests", "8,32", "requests that come at once")
    _list_flag(parser, "--input-len", "128", "random tokens of each prompt")
    _list_flag(parser, "--output-len", "128", "tokens of each answer")
    _model_flags(parser, warmup=1, repetitions=3)


def _configure_energy(parser: argparse.ArgumentParser) -> None:
    _list_flag(parser, "--requests", "1,8,32", "requests that come at once")
    _list_flag(parser, "--input-len", "128", "random tokens of each prompt")
    _list_flag(parser, "--output-len", "128", "tokens of each answer")
    _model_flags(parser, warmup=1, repetitions=3)


def _configure_startup(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser, warmup=1, repetitions=5)


def _offline(args: argparse.Namespace, requests: int) -> EngineConfig:
    """Room for the longest row and no more, and nothing kept from one round to the next."""
    return engine_config(
        args,
        args.model,
        max_model_len=max(args.input_len) + max(args.output_len),
        max_num_seqs=requests,
        max_waiting=max(requests, EngineConfig.max_waiting),
        enable_prefix_caching=False,
    )


def _latency(args: argparse.Namespace) -> int:
    config = _offline(args, 1)
    return _measured(args, config, inputs=args.input_len, outputs=args.output_len)


def _throughput(args: argparse.Namespace) -> int:
    return _measured(
        args,
        _offline(args, max(args.requests)),
        requests=args.requests,
        inputs=args.input_len,
        outputs=args.output_len,
    )


def _startup(args: argparse.Namespace) -> int:
    return _measured(args, engine_config(args, args.model))


def _measured(args: argparse.Namespace, config: EngineConfig, **sizes: Sequence[int]) -> int:
    bench = importlib.import_module(f"{__package__}.{args.bench}")
    repeats = Repeats(args.warmup, args.repetitions)
    status: int = bench.run(config, repeats=repeats, paths=_files(args), **sizes)
    return status


# ------------------------------------------------------------------------------------------- serve


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate above 0; inf sends all at once")
    return value


def _rates(text: str) -> list[float]:
    return [_rate(part) for part in text.split(",")]


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// or https:// address")
    return text.rstrip("/") if parts.path.rstrip("/") else text.rstrip("/") + "/v1"


_LIMITS = ("first", "token", "whole")


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", type=_url, help="of any OpenAI-compatible server; /v1 is meant where no path stands"
    )
    parser.add_argument("--model", metavar="NAME", help="default: the one that the server lists")
    parser.add_argument("--chat", action="store_true", help="chat completions; else completions")
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument(
        "--users",
        type=_wholes,
        metavar="N,N",
        help="users at once, each sending when the last answer is there (default: 1,8,32)",
    )
    loads.add_argument(
        "--rate",
        type=_rates,
        metavar="X,X",
        help="requests a second, at random (Poisson) and whoever still waits; inf: all at once",
    )
    parser.add_argument(
        "--lengths",
        choices=("fixed", "lognormal"),
        default="fixed",
        help="all alike, or spread about the means with a long tail (default: %(default)s)",
    )
    for name, mean in (("input", 128), ("output", 128)):
        parser.add_argument(
            f"--{name}-len",
            type=_whole,
            default=mean,
            metavar="N",
            help=f"mean tokens of the {name} (default: %(default)s)",
        )
    parser.add_argument(
        "--requests",
        type=_whole,
        metavar="N",
        help="of each level (default: 64, or twice the users)",
    )
    parser.add_argument(
        "--warmup", type=_rounds, default=4, metavar="N", help="before each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of texts and moments")
    parser.add_argument(
        "--no-ignore-eos",
        action="store_true",
        help="leave ignore_eos out, which OpenAI does not have: answers may end early",
    )
    parser.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="in every request"
    )
    for name, what in zip(
        _LIMITS, ("the first token", "each later token", "the whole answer"), strict=True
    ):
        parser.add_argument(
            f"--{name}-ms", type=_rate, metavar="X", help=f"goodput: {what} within X ms"
        )
    parser.add_argument(
        "--timeout", type=_rate, default=600.0, metavar="S", help="of a request (default: 600)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        metavar="KEY",
        help="default: the variable OPENAI_API_KEY",
    )
    _file_flags(parser)


def _serve(args: argparse.Namespace) -> int:
    try:
        serve = importlib.import_module(f"{__package__}.serve.run")
    except ImportError as error:
        raise BackendUnavailable(
            f"{error.name} is missing: pip install 'engineroom[serve]'"
        ) from None
    traffic = importlib.import_module(f"{__package__}.serve.traffic")
    measures = importlib.import_module(f"{__package__}.serve.measures")
    users = args.users or ([] if args.rate else [1, 8, 32])
    loads = [traffic.Load(users=n) for n in users]
    loads += [traffic.Load(rate=x) for x in args.rate or ()]
    settings = serve.Settings(
        url=args.url,
        model=args.model,
        chat=args.chat,
        key=args.api_key,
        timeout=args.timeout,
        loads=loads,
        lengths=traffic.Lengths(args.input_len, args.output_len, args.lengths),
        requests=args.requests,
        warmup=args.warmup,
        seed=args.seed,
        extra={**({} if args.no_ignore_eos else {"ignore_eos": True}), **args.extra_body},
        limits=measures.Limits(*(getattr(args, f"{name}_ms") for name in _LIMITS)),
    )
    status: int = serve.run(settings, _files(args))
    return status


BENCHES = {
    "latency": Bench(
        "One stream alone: first token, between tokens, end to end", _configure_latency, _latency
    ),
    "throughput": Bench(
        "Requests that come at once: tokens and requests a second",
        _configure_throughput,
        _throughput,
    ),
    "energy": Bench("Joules of a request, alone and beside others", _configure_energy, _throughput),
    "startup": Bench(
        "From the start of a process to its first token", _configure_startup, _startup
    ),
    "serve": Bench(
        "Users of an OpenAI-compatible server: what they wait for under load",
        _configure_serve,
        _serve,
    ),
    "kernels": Bench(
        "Each operation on the CPU beside what this machine allows", _configure_kernels, _kernels
    ),
    "gpu": Bench(
        "Proof of the GPU's kernels on this card: right, law 2, fast", _configure_gpu, _gpu
    ),
}
