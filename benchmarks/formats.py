"""How fast a model decodes and reads a prompt in every weight format that the CPU has kernels for.

    python benchmarks/formats.py [--model FOLDER] [--rounds 3] [--only NF4,bf16]

FOLDER is a llama model of 16-bit safetensors; the default is the twin of SmolLM2 that `python -m
benchmarks.peers prepare` makes. It is widened to rows of whole blocks of every format (with zeros,
and norms made up for them: the model's function stays), and its layers are written in each format,
rounded to nearest, head and table left in bf16, as published checkpoints have them. All models are
loaded at once and take turns. Prints a Markdown table: tokens a second, and the ratio to bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from baseline import machine  # noqa: E402

from benchmarks.peers.places import Places, default_folder  # noqa: E402
from engineroom import LLM, SamplingParams, __version__  # noqa: E402
from engineroom.engine.load.checkpoint import open_checkpoint  # noqa: E402
from engineroom.engine.load.save import Tensor, write_checkpoint  # noqa: E402
from engineroom.kernels.cpu.quantise import as_packed  # noqa: E402
from engineroom.kernels.weights import CODEBOOKS, F32, FORMATS, Format, RawWeight  # noqa: E402
from engineroom.quant.fp4 import nvfp4_rows  # noqa: E402
from engineroom.quant.ggml_rounding import quantise_ggml  # noqa: E402
from engineroom.quant.gguf import block_dtype  # noqa: E402
from engineroom.quant.groups import int4_rows, int8_rows, pack_nibbles  # noqa: E402
from engineroom.quant.own import METHOD  # noqa: E402
from engineroom.quant.rounding import Integers, e4m3_codes, round_to_nearest  # noqa: E402
from engineroom.quant.small_floats import e4m3_values  # noqa: E402
from engineroom.quant.values import dequantise  # noqa: E402

WIDTH = 256  # of the largest blocks
BATCHES = (1, 8, 32)
PROMPT, STEPS = 512, 48
ACT_ORDER = "I4G128, act-order"
# format -> what is read, or made on load, as it
READ_AS: Mapping[str, str] = {
    "BF16": "the model itself",
    "INT8": "`int8`, W8A16 and W8A8 with a scale a row, LLM.int8()",
    "I8G32": "GPTQ of 8 bits, W8A16 in groups",
    "Q8_0": "GGUF",
    "FP8": "`fp8`, FP8 with a scale a row or tensor",
    "FP8_128": "FP8 with a scale a block",
    "Q6_K": "GGUF",
    "Q5_0": "GGUF",
    "Q5_1": "GGUF",
    "Q5_K": "GGUF",
    "INT4": "`int4`",
    "I4G32": "GPTQ (2 to 4 bits), AWQ, W4A16 in groups of 32 or 64",
    "I4G128": "the same in groups of 128, or one a row",
    ACT_ORDER: "GPTQ and W4A16 with act-order",
    "NF4": "`nf4`, `bitsandbytes`",
    "FP4": "bitsandbytes",
    "MXFP4": "GGUF, gpt-oss, compressed-tensors",
    "NVFP4": "compressed-tensors, ModelOpt",
    "Q4_0": "GGUF",
    "Q4_1": "GGUF",
    "Q4_K": "GGUF",
}


# -------------------------------------------------------------------------------- rounding


def rows_of(values: np.ndarray, fmt: Format) -> np.ndarray:
    """uint8 [N, bytes of a row] of float32 values [N, K]."""
    if fmt.name in ("INT8", "INT4", "FP8", "NF4"):
        raw = RawWeight("w", F32, values.shape, {"data": values.reshape(-1).view(np.uint8)})
        data = as_packed(dataclasses.replace(raw, pack_as=fmt), 2).data
    elif fmt.name in ("Q8_0", "Q4_0", "Q4_K", "Q6_K"):
        data = np.frombuffer(quantise_ggml(values, fmt), np.uint8)
    else:
        data = _MADE[fmt.name](values, fmt)
    made = RawWeight("w", fmt, values.shape, {"data": data})
    wrong = float(np.square(dequantise(made) - values).mean() / np.square(values).mean())
    if not wrong < 0.04:  # of 4 bits it is 0.01; of bytes in a wrong order 2
        raise ValueError(f"{fmt.name} came out with a relative squared error of {wrong:.2g}")
    return data.reshape(len(values), -1)


def _integers(values: np.ndarray, fmt: Format) -> np.ndarray:
    bits, size = (8, 32) if fmt.name == "I8G32" else (4, fmt.block_elements)
    r = round_to_nearest(values, Integers(bits, size, True))
    groups = np.arange(values.shape[1] // 32) * 32 // size
    if bits == 8:
        return int8_rows(r.q, r.scale, r.zero, groups)
    return int4_rows(pack_nibbles((r.q + 8).astype(np.uint8)), r.scale, r.zero, groups)


def _halved(codes: np.ndarray) -> np.ndarray:
    """Codes [n, 32] below 16: element j beside element j + 16."""
    return codes[:, :16] | codes[:, 16:] << np.uint8(4)


def _legacy(values: np.ndarray, fmt: Format) -> np.ndarray:
    x = values.reshape(-1, 32)
    blocks = np.zeros(len(x), block_dtype(fmt))
    top = 31 if "high_bits" in (blocks.dtype.names or ()) else 15
    low = x.min(axis=1, keepdims=True) if fmt.name.endswith("1") else -np.abs(x).max(1)[:, None]
    high = x.max(axis=1, keepdims=True) if fmt.name.endswith("1") else -low
    blocks["d"] = (high - low) / top
    if fmt.name.endswith("1"):
        blocks["m"] = low
        q = (x - low) / np.maximum(blocks["d"].astype(np.float32), 1e-9)
    else:
        q = x / np.maximum(blocks["d"].astype(np.float32), 1e-9) + (top + 1) // 2
    q = np.clip(np.rint(q), 0, top).astype(np.uint8)
    blocks["nibbles"] = _halved(q & np.uint8(15))
    if top == 31:
        bits = (q >> np.uint8(4)).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        blocks["high_bits"] = np.bitwise_or.reduce(bits, axis=1)[:, None]
    return blocks.view(np.uint8)


def _q5_k(values: np.ndarray, fmt: Format) -> np.ndarray:
    x = values.reshape(-1, 8, 32)
    blocks = np.zeros(len(x), block_dtype(fmt))
    low = np.minimum(x.min(axis=2), 0)
    scale = (np.maximum(x.max(axis=2), 0) - low) / 31
    blocks["d"], blocks["dmin"] = scale.max(1)[:, None] / 63, -low.min(1)[:, None] / 63
    d, dmin = (np.maximum(blocks[name].astype(np.float32), 1e-9) for name in ("d", "dmin"))
    sc, mn = (np.clip(np.rint(n), 0, 63).astype(np.uint8) for n in (scale / d, -low / dmin))
    step, least = (d * sc)[..., None], (dmin * mn)[..., None]
    q = np.clip(np.rint((x + least) / np.maximum(step, 1e-9)), 0, 31).astype(np.uint8)
    four, six = np.uint8(4), np.uint8(6)
    packed = [n[:, :4] | (n[:, 4:] >> four) << six for n in (sc, mn)]
    packed.append((sc[:, 4:] & np.uint8(15)) | (mn[:, 4:] & np.uint8(15)) << four)
    blocks["scales"] = np.concatenate(packed, axis=1)
    pairs = (q & np.uint8(15)).reshape(-1, 4, 2, 32)
    blocks["nibbles"] = (pairs[:, :, 0] | pairs[:, :, 1] << four).reshape(-1, 128)
    bits = (q >> four) << np.arange(8, dtype=np.uint8)[:, None]
    blocks["high_bits"] = np.bitwise_or.reduce(bits, axis=1)
    return blocks.view(np.uint8)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _e2m1_codes(x: np.ndarray) -> np.ndarray:
    code = np.abs(np.abs(x)[..., None] - _E2M1).argmin(axis=-1).astype(np.uint8)
    return (code | np.signbit(x).astype(np.uint8) << np.uint8(3)).reshape(-1, 32)


def _mxfp4(values: np.ndarray, fmt: Format) -> np.ndarray:
    x = values.reshape(-1, 32)
    largest = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-9)
    scale = np.exp2(np.floor(np.log2(largest)) - 2)
    blocks = np.zeros(len(x), block_dtype(fmt))
    blocks["exponent"] = np.log2(scale) + 127
    blocks["nibbles"] = _halved(_e2m1_codes(x / scale))
    return blocks.view(np.uint8)


def _nvfp4(values: np.ndarray, fmt: Format) -> np.ndarray:
    """As its makers do it: the largest element of all becomes 6 of the largest scale, 448."""
    x = values.reshape(-1, 16)
    factor = np.abs(x).max() / np.float32(6 * 448)
    scale = e4m3_values()[e4m3_codes(np.abs(x).max(axis=1, keepdims=True) / (6 * factor))]
    code = _e2m1_codes(x / np.maximum(scale * factor, 1e-9))
    rows = (scale.reshape(len(values), -1), pack_nibbles(code).reshape(len(values), -1))
    return nvfp4_rows(*rows, factor / 2)


def _codebook(values: np.ndarray, fmt: Format) -> np.ndarray:
    x = values.reshape(-1, fmt.block_elements)
    blocks = np.zeros(len(x), block_dtype(fmt))
    blocks["absmax"] = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-9)
    table = np.array(CODEBOOKS[fmt.name], np.float32)
    order = np.argsort(table, kind="stable")
    middles = (table[order][1:] + table[order][:-1]) / 2
    code = order[np.searchsorted(middles, x / blocks["absmax"])].astype(np.uint8)
    blocks["nibbles"] = code[:, 0::2] << np.uint8(4) | code[:, 1::2]
    return blocks.view(np.uint8)


def _fp8_128(values: np.ndarray, fmt: Format) -> np.ndarray:
    x = values.reshape(-1, 128)
    blocks = np.zeros(len(x), block_dtype(fmt))
    blocks["scale"] = np.maximum(np.abs(x).max(axis=1, keepdims=True) / 448, 1e-9)
    blocks["values"] = e4m3_codes(x / blocks["scale"])
    return blocks.view(np.uint8)


_MADE: Mapping[str, Callable[[np.ndarray, Format], np.ndarray]] = {
    **dict.fromkeys(("I4G32", "I4G128", "I8G32"), _integers),
    **dict.fromkeys(("Q4_1", "Q5_0", "Q5_1"), _legacy),
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q5_K": _q5_k,
    "FP8_128": _fp8_128,
    "FP4": _codebook,
}


def act_order_tensors(module: str, values: np.ndarray) -> Iterator[Tensor]:
    """GPTQ's tensors of a linear layer: 4 bits in groups of 128 columns, at random places."""
    columns = values.shape[1]
    seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "little")
    order = np.random.default_rng(seed).permutation(columns)
    r = round_to_nearest(values[:, order], Integers(4, 128, True))
    index, q = np.empty(columns, np.int32), np.empty_like(r.q)
    index[order], q[:, order] = np.arange(columns) // 128, r.q
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    eights = (q.T + 8).astype(np.uint32).reshape(columns // 8, 8, -1) << shifts[:, None]
    zeros = np.full((columns // 128, len(values) // 8), 0x77777777, np.uint32)
    for suffix, dtype, data in (
        ("qweight", "I32", np.ascontiguousarray(np.bitwise_or.reduce(eights, axis=1))),
        ("qzeros", "I32", zeros),
        ("scales", "F16", np.ascontiguousarray(r.scale.T).astype(np.float16)),
        ("g_idx", "I32", index),
    ):
        yield Tensor(f"{module}.{suffix}", dtype, data.shape, data)


# ------------------------------------------------------------------------------- checkpoints


def widened(n: int) -> int:
    return -(-n // WIDTH) * WIDTH


def wide_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with every width a whole number of blocks."""
    hidden, head = config["hidden_size"], config["head_dim"]
    kv_heads = widened(config["num_key_value_heads"] * head) // head
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    return {
        **config,
        "hidden_size": widened(hidden),
        "intermediate_size": widened(config["intermediate_size"]),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group,
        # The mean square of a wider row is smaller, and so must be what is added to it.
        "rms_norm_eps": config["rms_norm_eps"] * hidden / widened(hidden),
    }


def wide_tensors(model: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of each tensor of the wider model."""
    hidden = config["hidden_size"]
    checkpoint = open_checkpoint(model)
    wide = wide_config(config)
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    heads |= {"v_proj": "num_key_value_heads"}
    try:
        for name in checkpoint.tensor_names:
            x = dequantise(checkpoint.tensor(name))
            if x.ndim == 1:
                x = x * np.float32(np.sqrt(hidden / wide["hidden_size"]))
                yield name, np.pad(x, (0, wide["hidden_size"] - hidden))
                continue
            module = name.split(".")[-2]
            rows = len(x) if module in ("embed_tokens", "lm_head") else widened(len(x))
            if module in heads:
                rows = wide[heads[module]] * config["head_dim"]
            columns = widened(x.shape[1])
            if module == "o_proj":
                columns = wide["num_attention_heads"] * config["head_dim"]
            yield name, np.pad(x, ((0, rows - len(x)), (0, columns - x.shape[1])))
    finally:
        checkpoint.close()


def write_models(model: Path, folder: Path, names: list[str]) -> dict[str, Path]:
    """A folder of each format, made once."""
    config = json.loads((model / "config.json").read_text())
    copied = [
        p for p in model.glob("*.json") if p.name in ("tokenizer.json", "tokenizer_config.json")
    ]
    out = {name: folder / name.replace(", ", "-") for name in names}
    for name, to in out.items():
        if to.exists():
            continue
        print(f"writing {to}", file=sys.stderr, flush=True)
        method: dict[str, Any] | None = {"quant_method": METHOD}
        if name == ACT_ORDER:
            method = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}
        settings = wide_config(config)
        settings |= {"quantization_config": method} if name != "BF16" else {}
        write_checkpoint(to, settings, _tensors(name, model, config), copied)
    return out


def _tensors(name: str, model: Path, config: Mapping[str, Any]) -> Iterator[Tensor]:
    for tensor, values in wide_tensors(model, config):
        module = tensor.removesuffix(".weight")
        if name == "BF16" or "_proj" not in module:
            bits = np.ascontiguousarray(values).view(np.uint32)
            rounded = bits + 0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1))
            yield Tensor(tensor, "BF16", values.shape, (rounded >> 16).astype("<u2"))
        elif name == ACT_ORDER:
            yield from act_order_tensors(module, values)
        else:
            rows = rows_of(np.ascontiguousarray(values), FORMATS[name])
            yield Tensor(f"{tensor}_{name.lower()}", "U8", rows.shape, rows)


# -------------------------------------------------------------------------------- measuring


def measure(llm: LLM, round_: int) -> dict[str, float]:
    """Tokens a second: of steps that decode 1, 8 and 32 streams, and of a prompt of 512."""
    greedy = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    ids = [(7 * round_ + 31 * i) % 40000 + 100 for i in range(PROMPT)]
    found = {}
    log = llm.engine.log
    for batch in BATCHES:
        before = log.num_steps
        llm.generate([ids[16 * i : 16 * i + 16] for i in range(batch)], greedy, use_tqdm=False)
        steps = [
            r.t_schedule_s + r.t_build_s + r.t_execute_s + r.t_commit_s
            for r in log.records[before - log.num_steps :]
            if len(r.requests) == batch and all(kind == "decode" for *_, kind in r.requests)
        ]
        found[f"decode, {batch}"] = batch / statistics.median(steps)
    one = llm.generate([ids], greedy.replace(max_tokens=1), use_tqdm=False)[0].timings
    found[f"prompt of {PROMPT}"] = PROMPT / one.time_to_first_token_s
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Places(default_folder()).twin)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="formats of the table, separated by semicolons")
    parser.add_argument("--prepare", action="store_true", help="write the models and stop")
    args = parser.parse_args()
    names = args.only.split(";") if args.only else list(READ_AS)
    if unknown := [name for name in names if name not in READ_AS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {'; '.join(READ_AS)}")
    folder = default_folder().parent / "formats" / args.model.resolve().name
    models = write_models(args.model, folder, ["BF16", *(n for n in names if n != "BF16")])
    if args.prepare:
        return
    options = {"num_blocks": 200, "max_num_seqs": max(BATCHES), "max_model_len": 1024}
    options |= {"enable_prefix_caching": False, "device": "cpu"}
    llms = {name: LLM(str(path), **options) for name, path in models.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in llms}
    for round_ in range(-1, args.rounds):  # the first warms up
        for name, llm in llms.items():
            row = measure(llm, max(round_, 0))
            if round_ >= 0:
                found[name].append(row)
    print(f"{machine()}; {datetime.date.today()}; engineroom {__version__}, numpy {np.__version__}")
    print(f"`python benchmarks/formats.py --rounds {args.rounds}`, medians\n")
    columns = list(found["BF16"][0])
    print(f"| tiles | of | bits | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    mid = {
        n: {c: statistics.median(r[c] for r in rows) for c in columns} for n, rows in found.items()
    }
    for name, row in mid.items():
        cells = [f"{row[c]:,.0f} ({row[c] / mid['BF16'][c]:.2f})" for c in columns]
        bits = FORMATS[name.split(",")[0]].bits_per_element
        print(f"| {name} | {READ_AS[name]} | {bits:.4g} | {' | '.join(cells)} |")
    for llm in llms.values():
        llm.close()


if __name__ == "__main__":
    main()
