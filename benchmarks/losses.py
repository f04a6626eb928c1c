"""What quantising loses: `python benchmarks/losses.py MODEL.gguf WORK [--llama-cpp BIN]`.

A file that is quantised already has its weights on a grid, where rounding again looks too good. So
uniform noise of one step of its grid is added to every matrix, and the result, in bf16, is the
16-bit model here: a GGUF file and, with the tokenizer that transformers reads from the file, a
folder. `engineroom quantize` makes each row's checkpoint of it, `engineroom eval --against` it the
row. With llama.cpp's tools (a folder of llama-imatrix, llama-quantize and llama-perplexity) its
quantiser makes files of the same types a tensor, calibrated on the same text with as many samples,
and its llama-perplexity scores both files. What was made is kept in WORK and not made twice.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engineroom.engine.load.checkpoint import GgufCheckpoint, open_checkpoint
from engineroom.engine.load.save import Tensor, write_checkpoint
from engineroom.engine.load.save_gguf import GgufTensor, write_gguf
from engineroom.engine.tools.texts import calibration_text, evaluation_text
from engineroom.kernels.weights import BF16, F32
from engineroom.quant.rounding import to_bfloat16
from engineroom.quant.values import dequantise

_GRID = 16  # neighbours that share a step of their grid
_BF16_FILE = 32  # llama.cpp's number of such a file
_FAMILIES = {"llama": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FOLDER_ROWS = (
    *(("W4A16", method, ()) for method in ("gptq", "awq", "rtn")),
    *(("W4A16", method, ("--group-size", "32")) for method in ("gptq", "awq", "rtn")),
    ("W8A16", "rtn", ()),
    ("FP8_DYNAMIC", "rtn", ()),
)
FILE_ROWS = (
    ("Q4_K", "imatrix"),
    ("Q4_K", "rtn"),
    ("Q4_0", "imatrix"),
    ("Q4_0", "rtn"),
    ("Q6_K", "imatrix"),
    ("Q8_0", "rtn"),
)


def noised(source: GgufCheckpoint) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by name, float32 of bfloat16 numbers, matrices with noise."""
    rng = np.random.default_rng(0)
    for name in source.tensor_names:
        weight = source.tensor(name)
        values = dequantise(weight)
        if not weight.format.is_float:
            groups = values.reshape(-1, _GRID)
            gaps = np.diff(np.sort(groups, axis=1), axis=1)
            step = np.where(gaps > 0, gaps, np.inf).min(axis=1, keepdims=True)
            step[np.isinf(step)] = 0
            noise = rng.uniform(-0.5, 0.5, groups.shape).astype(np.float32) * step
            values = (groups + noise).reshape(values.shape)
        yield name, to_bfloat16(values)


def bits(values: np.ndarray) -> bytes:
    raw: bytes = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return raw


def sixteen_bits(file: Path, work: Path) -> tuple[Path, Path]:
    """The 16-bit model as a GGUF file and as a folder."""
    made, folder = work / "model-BF16.gguf", work / "model"
    if made.exists() and folder.exists():
        return made, folder
    source = open_checkpoint(file)
    assert isinstance(source, GgufCheckpoint)
    tensors = dict(noised(source))
    entries = [
        GgufTensor(name, F32, values.shape, values.tobytes)  # norms: llama.cpp wants them wide
        if values.ndim == 1
        else GgufTensor(name, BF16, values.shape, partial(bits, values))
        for name, values in tensors.items()
    ]
    made.unlink(missing_ok=True)
    write_gguf(made, source.file, entries, _BF16_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(file, folder, dict(source.metadata), tensors)
    source.close()
    return made, folder


def write_folder(
    file: Path, folder: Path, meta: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    family = str(meta["general.architecture"])
    tokens = folder.with_name("tokenizer")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(tokens)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    settings = {k: v for k, v in config.to_dict().items() if v is not None}
    settings |= {"architectures": [_FAMILIES[family]], "dtype": "bfloat16"}
    settings["tie_word_embeddings"] = "output.weight" not in tensors
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}

    def entry(name: str, values: np.ndarray) -> Tensor:
        parts = name.split(".")
        kind = parts[2] if parts[0] == "blk" else parts[0]
        if family == "llama" and kind in heads:  # rope's halves, which the file has as pairs
            count = int(meta[f"llama.attention.{heads[kind]}"])
            values = values.reshape(count, -1, 2, values.shape[1]).swapaxes(1, 2)
            values = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
        if family == "gemma3" and kind.endswith("norm"):  # the file has 1 added
            values = to_bfloat16(values - np.float32(1))
        there = _OUTSIDE.get(kind) or f"model.layers.{parts[1]}.{(_LAYER | _NORMS[family])[kind]}"
        return Tensor(f"{there}.{parts[-1]}", "BF16", values.shape, bits(values))

    copied = [p for p in tokens.iterdir() if p.name.startswith(("tokenizer", "special", "chat"))]
    write_checkpoint(folder, settings, (entry(*item) for item in tensors.items()), copied)


# ------------------------------------------------------------------------------------------ rows


class Bench:
    """Runs of the command, each kept by its name in WORK."""

    def __init__(self, work: Path, chunks: int, samples: int) -> None:
        self.work, self.chunks, self.samples = work, chunks, samples
        self.texts = {
            "eval": work / "evaluation.txt",
            "calibrate": work / "calibration.txt",
        }
        self.texts["eval"].write_text(evaluation_text().text, "utf-8")
        self.texts["calibrate"].write_text(calibration_text().text, "utf-8")

    def quantised(self, model: Path, format: str, method: str, *options: str) -> Path:
        name = "-".join([format, method, *(o for o in options if not o.startswith("-"))])
        out = self.work / (f"{name}.gguf" if model.suffix == ".gguf" else name)
        if not out.exists():
            command = ["quantize", model, "-o", out, "--format", format, "--method", method]
            command += [*options, "--samples", str(self.samples)]
            self._engineroom(*command, "--text", self.texts["calibrate"])
        return out

    def loss(self, model: Path, against: Path | None, *options: str) -> dict[str, Any]:
        name = "".join([model.name, *options])
        kept = self.work / f"{name}.loss.json"
        if not kept.exists():
            command = ["eval", model, *options, "--chunks", str(self.chunks)]
            command += ["--text", self.texts["eval"], "--json"]
            command += [] if against is None else ["--against", against]
            kept.write_text(self._engineroom(*command), "utf-8")
        found: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        return found

    def tool(self, llama_cpp: Path, name: str, *arguments: Any) -> str:
        """What one of llama.cpp's tools prints."""
        command = [str(x) for x in (llama_cpp / name, *arguments)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(
                f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-2000:]}"
            )
        return done.stdout

    def _engineroom(self, *arguments: Any) -> str:
        command = [sys.executable, "-m", "engineroom", *map(str, arguments)]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True).stdout


def folder_table(bench: Bench, folder: Path) -> None:
    print("| weights | bits | mean KL | 99.9 % KL | same token | perplexity |")
    print("| --- | --- | --- | --- | --- | --- |")
    show("its 16 bits", bench.loss(folder, None))
    for method in ("int8", "int4"):
        against = ("--quantization", method, "--against-quantization", "none")
        show(f"`--quantization {method}`", bench.loss(folder, folder, *against))
    for format, method, options in FOLDER_ROWS:
        made = bench.quantised(folder, format, method, *options)
        size = f", groups of {options[1]}" if options else ""
        show(f"`{format}`, {method}{size}", bench.loss(made, folder))


def file_table(bench: Bench, made: Path, llama_cpp: Path | None) -> None:
    """Files of our quantiser and of llama.cpp's, each scored by both engines."""
    print("| file | made by | bits | mean KL | same token | KL by llama.cpp | same token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    base, imatrix = bench.work / "base.dat", bench.work / "imatrix.gguf"
    if llama_cpp is not None and not base.exists():
        common = ("-c", "512", "--chunks")
        text = bench.texts["calibrate"]
        bench.tool(
            llama_cpp, "llama-imatrix", "-m", made, "-f", text, "-o", imatrix, *common,
            bench.samples, "--output-format", "gguf",
        )  # fmt: skip
        growing = base.with_suffix(".growing")
        bench.tool(
            llama_cpp, "llama-perplexity", "-m", made, "-f", bench.texts["eval"],
            "--kl-divergence-base", growing, *common, bench.chunks,
        )  # fmt: skip
        growing.rename(base)
    for format, method in FILE_ROWS:
        ours = bench.quantised(made, format, method)
        files = [("engineroom", ours)]
        if llama_cpp is not None:
            files.append(("llama.cpp", theirs(bench, llama_cpp, made, ours, format, method)))
        for maker, file in files:
            found = bench.loss(file, made)
            cells = [f"`{format}`, {method}", maker, f"{found['model']['bits_per_weight']:.2f}"]
            cells += [number(found["mean_kl"], 4), number(found["top1"], 3)]
            if llama_cpp is not None:
                cells += judged(bench, llama_cpp, file, base)
            print(f"| {' | '.join(cells)} |", flush=True)


def theirs(bench: Bench, llama_cpp: Path, made: Path, ours: Path, format: str, method: str) -> Path:
    """llama-quantize's file with the types that each tensor of ours has."""
    out = ours.with_name(f"llama-{ours.name}")
    if out.exists():
        return out
    checkpoint = open_checkpoint(ours)
    types = ours.with_suffix(".types")
    types.write_text(
        "\n".join(
            f"^{re.escape(name)}$={checkpoint.tensor(name).format.name.lower()}"
            for name in checkpoint.tensor_names
            if not checkpoint.tensor(name).format.is_float
        )
    )
    table = checkpoint.tensor("token_embd.weight").format.name.lower()
    checkpoint.close()
    options = ["--imatrix", bench.work / "imatrix.gguf"] if method == "imatrix" else []
    options += ["--tensor-type-file", types, "--token-embedding-type", table]
    kind = "Q4_K_S" if format == "Q4_K" else format
    growing = out.with_suffix(".growing")
    bench.tool(llama_cpp, "llama-quantize", *options, made, growing, kind)
    growing.rename(out)
    return out


def judged(bench: Bench, llama_cpp: Path, file: Path, base: Path) -> list[str]:
    """Mean KL divergence and the share of equal tokens, by llama-perplexity."""
    kept = bench.work / f"{file.name}.llama.txt"
    if not kept.exists():
        options = ("--kl-divergence-base", base, "--kl-divergence", "-c", "512")
        kept.write_text(bench.tool(llama_cpp, "llama-perplexity", "-m", file, *options), "utf-8")
    text = kept.read_text("utf-8")
    kl = re.search(r"Mean\s+KLD:\s+([\d.]+) ±\s+([\d.]+)", text)
    same = re.search(r"Same top p:\s+([\d.]+) ±\s+([\d.]+)", text)
    if kl is None or same is None:
        raise SystemExit(f"llama-perplexity says no divergence:\n{text[-2000:]}")
    percent = [float(x) / 100 for x in same.groups()]
    return [
        f"{float(kl[1]):.4f} ± {float(kl[2]):.4f}",
        f"{percent[0]:.3f} ± {percent[1]:.3f}",
    ]


def show(name: str, found: dict[str, Any]) -> None:
    cells = [name, f"{found['model']['bits_per_weight']:.2f}"]
    if "mean_kl" in found:
        cells += [number(found["mean_kl"], 4), number(found["kl_999"], 2)]
        cells += [number(found["top1"], 3)]
    else:
        cells += ["", "", ""]
    print(f"| {' | '.join([*cells, number(found['perplexity'], 2)])} |", flush=True)


def number(estimate: dict[str, float], digits: int) -> str:
    return f"{estimate['value']:.{digits}f} ± {estimate['error']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a quantised GGUF file, of Llama or Gemma 3")
    parser.add_argument("work", type=Path, help="the folder for what is made")
    parser.add_argument("--llama-cpp", type=Path, help="the folder of llama.cpp's tools")
    parser.add_argument("--chunks", type=int, default=10, help="of 512 tokens, scored")
    parser.add_argument("--samples", type=int, default=32, help="of 512 tokens, calibrated on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    made, folder = sixteen_bits(args.model, args.work)
    bench = Bench(args.work, args.chunks, args.samples)
    folder_table(bench, folder)
    print()
    file_table(bench, made, args.llama_cpp)


if __name__ == "__main__":
    main()
