"""The command: `python -m benchmarks.peers prepare | run | report`, from the repository's root."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from . import plot, report
from .engines import CLASSES, table
from .places import ROOT, VARIABLE, NotPrepared, Places, default_folder
from .prepare import STEPS, prepare
from .run import NAMES, QUICK, Plan, Sizes, run


def comma(known: tuple[str, ...]) -> object:
    def parse(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return words

    return parse


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="build and install the peers; goes on where it was")
    one.add_argument("--only", default=[], type=comma(tuple(s.name for s in STEPS)))
    two = commands.add_parser("run", help="measure ours and theirs in turn")
    two.add_argument("--rounds", type=int, default=3)
    two.add_argument("--engines", default="", help="parts of names, by commas: engineroom,vllm")
    two.add_argument("--classes", default=list(CLASSES), type=comma(CLASSES))
    two.add_argument("--workloads", default=list(NAMES), type=comma(NAMES))
    two.add_argument("--json", type=Path, help="write the result here, after every figure")
    two.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    two.add_argument("--no-kl", action="store_true", help="leave the divergences out")
    two.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    two.add_argument("--timeout", type=float, default=900, help="seconds per request of a worker")
    two.add_argument("--our-options", default="{}", type=json.loads, help="LLM()'s, as JSON")
    for command in (one, two):
        command.add_argument(
            "--folder", type=Path, default=default_folder(), help=f"default: ${VARIABLE} or a cache"
        )
    three = commands.add_parser("report", help="a Markdown table, and an SVG")
    three.add_argument("files", nargs="+", type=Path)
    three.add_argument(
        "--svg",
        type=Path,
        default=ROOT / "docs" / "measurements" / "peers.svg",
        help="where the plot goes; the table links to it",
    )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    if args.command == "prepare":
        return 1 if prepare(args.folder, args.only) else 0
    try:
        if args.command == "report":
            result = report.load(args.files)
            args.svg.parent.mkdir(parents=True, exist_ok=True)
            args.svg.write_text(plot.svg(result), encoding="utf-8")
            docs = ROOT / "docs"
            inside = args.svg.absolute().is_relative_to(docs)
            link = args.svg.absolute().relative_to(docs).as_posix() if inside else args.svg.name
            sys.stdout.write(report.markdown(result, link))
            return 0
        plan = Plan(
            rounds=args.rounds,
            classes=args.classes,
            engines=[word for word in args.engines.split(",") if word.strip()],
            workloads=args.workloads,
            sizes=QUICK if args.quick else Sizes(),
            threads=args.threads,
            timeout=args.timeout,
            with_kl=not args.no_kl,
        )
        result = run(Places(args.folder.absolute()), table(args.our_options), plan, args.json)
    except (NotPrepared, report.BadReport) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
