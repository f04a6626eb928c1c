"""The command: `python -m benchmarks.peers prepare | run | scaling | report`, from the root."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from . import plot, report, scaling
from .engines import CLASSES, table
from .places import ROOT, VARIABLE, NotPrepared, Places, default_folder
from .prepare import STEPS, prepare
from .run import NAMES, QUICK, Plan, Sizes, chosen, run
from .worker import WorkerFailed

DOCS = ROOT / "docs"


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def comma(known: tuple[str, ...]) -> object:
    def parse(text: str) -> list[str]:
        for word in words(text):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return words(text)

    return parse


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="build and install the peers; goes on where it was")
    one.add_argument("--only", default=[], type=comma(tuple(s.name for s in STEPS)))
    two = commands.add_parser("run", help="measure ours and theirs in turn")
    two.add_argument("--engines", default=[], type=words, help="parts of names: engineroom,vllm")
    two.add_argument("--classes", default=list(CLASSES), type=comma(CLASSES))
    two.add_argument("--workloads", default=list(NAMES), type=comma(NAMES))
    two.add_argument("--no-kl", action="store_true", help="leave the divergences out")
    two.add_argument(
        "--patience", type=float, default=Plan.patience, help="seconds; once if longer"
    )
    two.add_argument("--minutes", type=float, default=Plan.minutes, help="start nothing later")
    three = commands.add_parser("scaling", help="a step of ours against batch and context")
    three.add_argument(
        "--engines", default=list(scaling.DEFAULT), type=words, help="parts of names"
    )
    for command in (two, three):
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--json", type=Path, help="write the result here")
        command.add_argument(
            "--quick", action="store_true", help="tiny sizes: does everything run?"
        )
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--timeout", type=float, default=900, help="seconds of one request")
        command.add_argument(
            "--our-options", default="{}", type=json.loads, help="LLM()'s, as JSON"
        )
    for command in (one, two, three):
        command.add_argument(
            "--folder", type=Path, default=default_folder(), help=f"default: ${VARIABLE} or a cache"
        )
    four = commands.add_parser("report", help="a Markdown table, and an SVG")
    four.add_argument("files", nargs="+", type=Path)
    for command, name in ((three, "scaling.svg"), (four, "peers.svg")):
        command.add_argument(
            "--svg",
            type=Path,
            default=DOCS / "measurements" / name,
            help="where the plot goes; the table links to it",
        )
    return top


def save_plot(file: Path, svg: str) -> str:
    """Write the plot. Returns how a page in docs/ links to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(svg, encoding="utf-8")
    inside = file.absolute().is_relative_to(DOCS)
    return file.absolute().relative_to(DOCS).as_posix() if inside else file.name


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers are ended
    if args.command == "prepare":
        return 1 if prepare(args.folder, args.only) else 0
    try:
        if args.command == "report":
            result = report.load(args.files)
            sys.stdout.write(report.markdown(result, save_plot(args.svg, plot.svg(result))))
            return 0
        places, entries = Places(args.folder.absolute()), table(args.our_options)
        if args.command == "scaling":
            result = scaling.measure(
                places,
                chosen(entries, args.engines),
                scaling.QUICK if args.quick else scaling.Points(),
                rounds=args.rounds,
                threads=args.threads,
                timeout=args.timeout,
                file=args.json,
            )
            link = save_plot(args.svg, scaling.svg(result))
            sys.stdout.write("\n" + scaling.markdown(result, link))
            return 0
        plan = Plan(
            rounds=args.rounds,
            classes=args.classes,
            engines=args.engines,
            workloads=args.workloads,
            sizes=QUICK if args.quick else Sizes(),
            threads=args.threads,
            timeout=args.timeout,
            with_kl=not args.no_kl,
            patience=args.patience,
            minutes=args.minutes,
        )
        result = run(places, entries, plan, args.json)
    except (NotPrepared, WorkerFailed, report.BadReport) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if any("error" in row for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
