"""`engineroom quantize`: a smaller checkpoint."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    from ..tools.options import count
    from ..tools.quantize import FORMATS

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


def run(args: argparse.Namespace) -> int:
    from ..tools.plain import tell
    from ..tools.quantize import DEFAULT_METHODS, QuantizeConfig, quantize, render
    from ..tools.quantize_gguf import quantize_gguf
    from ..tools.texts import calibration_text

    names = ("model", "out", "method", "format", "group_size", "samples", "context", "device")
    args.method = args.method or DEFAULT_METHODS.get(args.format, "rtn")
    config = QuantizeConfig(**{n: getattr(args, n) for n in (*names, "threads")})
    text = calibration_text(args.text)
    if config.format.startswith("Q"):
        report = quantize_gguf(config, text)
    else:
        report = quantize(config, text, restart=args.restart)
    tell(report, render, as_json=args.json)
    return 0


__all__ = ["configure", "run"]
