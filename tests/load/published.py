"""Quantised checkpoints as their makers write them, transcribed from the formats' descriptions.

Each kind gives, for one module, its tensors by suffix and the values that they stand for, computed
from the numbers that were packed and not from the packed ones; `write_model` makes a small Llama.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.load.writers import to_bf16, write_safetensors

Tensor = tuple[str, tuple[int, ...], bytes]
Made = tuple[dict[str, Tensor], np.ndarray]
Maker = Callable[[np.random.Generator, int, int], Made]


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """Non-negative integers along axis 0 as one string of bits, lowest first, in 32-bit words."""
    columns = []
    for column in values.T:
        ones = (column.astype(np.int64)[:, None] >> np.arange(bits)) & 1
        flat = np.concatenate([ones.reshape(-1), np.zeros(-ones.size % 32, np.int64)])
        columns.append(np.packbits(flat.astype(np.uint8), bitorder="little").view("<u4"))
    return np.stack(columns, axis=1)


def tensor(dtype: str, values: np.ndarray) -> Tensor:
    kinds = {"I32": "<u4", "I64": "<i8", "I8": "i1", "U8": "u1", "F16": "<f2", "F32": "<f4"}
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32) >> 16
        return dtype, values.shape, bits.astype("<u2").tobytes()
    kind = kinds.get(dtype, "u1")
    return dtype, values.shape, np.ascontiguousarray(values.astype(kind)).tobytes()


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Ordinary sizes that bf16 holds, a zero among them, one much larger, one tiny."""
    s = rng.uniform(0.5, 1.5, shape).astype(np.float32) / 64
    s.flat[0], s.flat[-1], s.flat[s.size // 2] = 0, 2, 2.0**-14
    return (s.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def gptq(bits: int, group: int, *, sym: bool = False, act: bool = False, v2: bool = False) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        groups = 1 if group == -1 else -(-k // group)
        q = rng.integers(0, 1 << bits, (n, k))
        zero = rng.integers(0, 1 << bits, (n, groups))
        if sym:
            zero[:] = 1 << (bits - 1)
        s = scales(rng, n, groups)
        index = np.zeros(k, np.int64) if group == -1 else np.arange(k) // group
        if act:
            index = rng.permutation(index)
        values = s[:, index] * (q - zero[:, index]).astype(np.float32)
        if v2 or bits == 3:
            zeros = stream((zero - (not v2)) % (1 << bits), bits)
        else:  # whole words, as GPTQModel does it: a zero of 0 borrows from the next
            zeros = stream(zero, bits) - stream(np.ones_like(zero), bits)
        tensors = {
            ".qweight": tensor("I32", stream(q.T, bits)),
            ".qzeros": tensor("I32", zeros.T),
            ".scales": tensor("F16", s.T),
            ".g_idx": tensor("I32", index),
        }
        return tensors, values

    return make


def awq(group: int) -> Maker:
    def words(values: np.ndarray) -> np.ndarray:
        eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return (eights.astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(
            axis=2, dtype=np.uint32
        )

    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        groups = 1 if group == -1 else k // group
        q, zero = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (groups, n))
        s = scales(rng, groups, n)
        index = np.arange(k) // (k // groups)
        tensors = {
            ".qweight": tensor("I32", words(q)),
            ".qzeros": tensor("I32", words(zero)),
            ".scales": tensor("F16", s),
        }
        return tensors, (s[index] * (q - zero[index]).astype(np.float32)).T

    return make


def integers(
    bits: int, group: int | None, *, packed: bool, zeros: bool = False, act: bool = False
) -> Maker:
    """compressed-tensors; a group of None is one scale for all."""

    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        half = 1 << (bits - 1)
        q = rng.integers(-half, half, (n, k))
        groups = 1 if group in (None, -1) else k // int(group)  # type: ignore[arg-type]
        rows = 1 if group is None else n
        s = scales(rng, rows, groups) if rows * groups > 2 else np.full((1, 1), 1 / 64, np.float32)
        index = np.arange(k) * groups // k
        index = rng.permutation(index) if act else index
        zero = rng.integers(-half, half, (rows, groups)) if zeros else np.zeros((rows, groups), int)
        values = (s[:, index] * (q - zero[:, index]).astype(np.float32)).reshape(n, k)
        tensors = {".weight_scale": tensor("BF16", s if group is not None else s.reshape(1))}
        if packed:
            tensors[".weight_packed"] = tensor("I32", stream((q + half).T, bits).T)
            tensors[".weight_shape"] = tensor("I64", np.array([n, k]))
            if zeros:
                tensors[".weight_zero_point"] = tensor("I32", stream(zero + half, bits))
        else:
            tensors[".weight"] = tensor("I8", q)
            if zeros:
                tensors[".weight_zero_point"] = tensor("I8", zero)
        if act:
            tensors[".weight_g_idx"] = tensor("I32", index)
        return tensors, values

    return make


def e4m3(code: np.ndarray) -> np.ndarray:
    exponent, fraction = (code >> 3) & 15, code & 7
    size = np.where(exponent > 0, (1 + fraction / 8) * 2.0 ** (exponent - 7.0), fraction / 512)
    return np.where(code >= 128, -size, size).astype(np.float32)


def fp8(scale_name: str, kind: str, *, static: bool = False) -> Maker:
    """kind: "tensor", "row" or "block"."""

    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        code = rng.integers(0, 256, (n, k))
        code[code % 128 == 127] = 0
        if kind == "tensor":
            s = np.full((), 0.0123, np.float32)
            wide = np.broadcast_to(s, (n, k))
        elif kind == "row":
            s = scales(rng, n, 1) / 64
            wide = np.broadcast_to(s, (n, k))
        else:
            s = rng.uniform(0.5, 2, (-(-n // 128), -(-k // 128))).astype(np.float32) / 256
            wide = s.repeat(128, axis=0)[:n].repeat(128, axis=1)[:, :k]
        tensors = {".weight": tensor("F8_E4M3", code), scale_name: tensor("F32", s)}
        if static:
            tensors[".input_scale"] = tensor("F32", np.ones((), np.float32))
        return tensors, wide * e4m3(code)

    return make


NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0"""
FP4 = "0 0.0052083333 0.6666667 1 0.33333333 0.5 0.16666667 0.25"


def four_bits(kind: str, block: int, *, double: bool) -> Maker:
    half = np.array(FP4.split(), np.float32)
    table = np.array(NF4.split(), np.float32) if kind == "nf4" else np.concatenate([half, -half])

    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        code = rng.integers(0, 16, n * k)
        blocks = -(-n * k // block)
        state: dict[str, Any] = {
            "quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k],
        }  # fmt: skip
        tensors = {
            ".weight": tensor("U8", (code[0::2] << 4 | code[1::2])[:, None]),
            ".weight.quant_map": tensor("F32", table),
        }
        if double:
            book = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            small = rng.integers(0, 256, blocks)
            size = rng.uniform(0.001, 0.01, -(-blocks // 256)).astype(np.float32)
            absmax = book[small] * size.repeat(256)[:blocks] + np.float32(0.0625)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0625}
            tensors[".weight.absmax"] = tensor("U8", small)
            tensors[".weight.nested_absmax"] = tensor("F32", size)
            tensors[".weight.nested_quant_map"] = tensor("F32", book)
        else:
            absmax = rng.uniform(0, 0.1, blocks).astype(np.float32)
            absmax[0] = 0
            tensors[".weight.absmax"] = tensor("F32", absmax)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f".weight.quant_state.bitsandbytes__{kind}"] = tensor("U8", text)
        values = table[code] * absmax.repeat(block)[: n * k]
        return tensors, values.reshape(n, k)

    return make


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def mxfp4(codes_name: str, scales_name: str, *, grouped: bool = False) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        code = rng.integers(0, 16, (n, k))
        code[:, :32] = 0  # a group of zeros
        code[:, 32:64] = 8  # and of negative ones
        exponent = rng.integers(117, 124, (n, k // 32))
        exponent[0, :4] = 0, 1, 254, 127
        packed = code[:, 0::2] | code[:, 1::2] << 4
        shape = (n, k // 32, 16) if grouped else packed.shape
        with np.errstate(over="ignore"):
            values = np.ldexp(E2M1[code], np.repeat(exponent, 32, axis=1) - 127)
        tensors = {
            codes_name: tensor("U8", packed.reshape(shape)),
            scales_name: tensor("U8", exponent),
        }
        return tensors, values.astype(np.float32)

    return make


def nvfp4(codes_name: str, whole_name: str, *, divides: bool) -> Maker:
    def make(rng: np.random.Generator, n: int, k: int) -> Made:
        code, scale = rng.integers(0, 16, (n, k)), rng.integers(0, 0x7F, (n, k // 16))
        scale[0, :4] = 0, 1, 0x7E, 0x80
        whole = np.float32(2688.7 if divides else 0.00123)
        factor = e4m3(scale) / whole if divides else e4m3(scale) * whole
        tensors = {
            codes_name: tensor("U8", code[:, 0::2] | code[:, 1::2] << 4),
            ".weight_scale": tensor("F8_E4M3", scale),
            whole_name: tensor("F32", whole.reshape(1) if divides else whole),
            ".input_scale": tensor("F32", np.ones((), np.float32)),
        }
        return tensors, np.repeat(factor, 16, axis=1) * E2M1[code]

    return make


def llm_int8(rng: np.random.Generator, n: int, k: int) -> Made:
    q, largest = rng.integers(-127, 128, (n, k)), scales(rng, n) * 127
    tensors = {
        ".weight": tensor("I8", q),
        ".SCB": tensor("F32", largest),
        ".weight_format": tensor("U8", np.zeros((), np.uint8)),
    }
    return tensors, (largest / np.float32(127))[:, None] * q.astype(np.float32)


def ct(form: str, activations: Mapping[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**scheme, "dynamic": False, "observer": "minmax", **weights},
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def gptq_config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True, "sym": False,
        "damp_percent": 0.01, **more,
    }  # fmt: skip


_INT8 = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
_FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor"}
_MX = {"num_bits": 4, "type": "float", "dynamic": True, "group_size": 32, "strategy": "group"}
_NV = {**_MX, "group_size": 16, "strategy": "tensor_group", "dynamic": "local"}
_AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
_BNB = {"quant_method": "bitsandbytes", "load_in_8bit": False, "_load_in_4bit": True}

# name -> what config.json says, the maker, the format that the weight has then
KINDS: Mapping[str, tuple[dict[str, Any], Maker, str]] = {
    "gptq 4 bits, 128": (gptq_config(4, 128), gptq(4, 128), "I4G128"),
    "gptq 4 bits, 32, symmetric": (gptq_config(4, 32), gptq(4, 32, sym=True), "I4G32"),
    "gptq 4 bits, 64, v2": (
        gptq_config(4, 64, checkpoint_format="gptq_v2"), gptq(4, 64, v2=True), "I4G32",
    ),
    "gptq 4 bits, 128, act-order": (gptq_config(4, 128), gptq(4, 128, act=True), "I4G128"),
    "gptq 4 bits, one group": (gptq_config(4, -1), gptq(4, -1), "I4G128"),
    "gptq 8 bits, 32, act-order": (gptq_config(8, 32), gptq(8, 32, act=True), "I8G32"),
    "gptq 8 bits, 128": (gptq_config(8, 128), gptq(8, 128), "I8G32"),
    "gptq 3 bits, 128": (gptq_config(3, 128), gptq(3, 128), "I4G128"),
    "gptq 3 bits, 32, act-order": (gptq_config(3, 32), gptq(3, 32, act=True), "I4G32"),
    "gptq 2 bits, 64": (gptq_config(2, 64), gptq(2, 64), "I4G32"),
    "awq, 128": ({**_AWQ, "group_size": 128}, awq(128), "I4G128"),
    "awq, 32": ({**_AWQ, "group_size": 32, "version": "GEMM"}, awq(32), "I4G32"),
    "W4A16, 128": (ct("pack-quantized", group_size=128), integers(4, 128, packed=True), "I4G128"),
    "W4A16, 32, asymmetric": (
        ct("pack-quantized", group_size=32, symmetric=False),
        integers(4, 32, packed=True, zeros=True), "I4G32",
    ),
    "W4A16, 128, act-order": (
        ct("pack-quantized", group_size=128, actorder="group"),
        integers(4, 128, packed=True, act=True), "I4G128",
    ),
    "W4A16, channel": (
        ct("pack-quantized", strategy="channel"), integers(4, -1, packed=True), "I4G128",
    ),
    "W8A16, channel": (
        ct("pack-quantized", strategy="channel", num_bits=8), integers(8, -1, packed=True), "INT8",
    ),
    "W8A16, 128, asymmetric": (
        ct("pack-quantized", group_size=128, num_bits=8, symmetric=False),
        integers(8, 128, packed=True, zeros=True), "I8G32",
    ),
    "W8A8, channel": (
        ct("int-quantized", _INT8, strategy="channel", num_bits=8),
        integers(8, -1, packed=False), "INT8",
    ),
    "W8A8, channel, asymmetric": (
        ct("int-quantized", _INT8, strategy="channel", num_bits=8, symmetric=False),
        integers(8, -1, packed=False, zeros=True), "I8G32",
    ),
    "W8A8, tensor": (
        ct("int-quantized", _INT8, strategy="tensor", num_bits=8),
        integers(8, None, packed=False), "INT8",
    ),
    "FP8, row": (
        ct("float-quantized", _FP8, strategy="channel", num_bits=8, type="float"),
        fp8(".weight_scale", "row"), "FP8",
    ),
    "FP8, tensor, static": (
        ct("float-quantized", _FP8, strategy="tensor", num_bits=8, type="float"),
        fp8(".weight_scale", "tensor", static=True), "FP8",
    ),
    "FP8 of blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        fp8(".weight_scale_inv", "block"), "FP8_128",
    ),
    "FP8 of tensors": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(".weight_scale", "tensor", static=True), "FP8",
    ),
    "NF4": ({**_BNB, "bnb_4bit_quant_type": "nf4"}, four_bits("nf4", 64, double=False), "NF4"),
    "NF4, double": (
        {**_BNB, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        four_bits("nf4", 64, double=True), "NF4",
    ),
    "FP4": ({**_BNB, "bnb_4bit_quant_type": "fp4"}, four_bits("fp4", 64, double=False), "FP4"),
    "FP4, double": (
        {**_BNB, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        four_bits("fp4", 128, double=True), "FP4",
    ),
    "FP4, blocks across rows": (
        {**_BNB, "bnb_4bit_quant_type": "fp4"}, four_bits("fp4", 512, double=False), "BF16",
    ),
    "MXFP4, gpt-oss": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        mxfp4(".weight_blocks", ".weight_scales", grouped=True), "MXFP4",
    ),
    "MXFP4": (
        ct("mxfp4-pack-quantized", _MX, type="float", group_size=32, scale_dtype="torch.uint8"),
        mxfp4(".weight_packed", ".weight_scale"), "MXFP4",
    ),
    "NVFP4": (
        ct("nvfp4-pack-quantized", _NV, type="float", group_size=16, strategy="tensor_group"),
        nvfp4(".weight_packed", ".weight_global_scale", divides=True), "NVFP4",
    ),
    "NVFP4, ModelOpt": (
        {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
            "producer": {"name": "modelopt"},
            "config_groups": {"group_0": {
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "targets": ["Linear"],
            }},
        },
        nvfp4(".weight", ".weight_scale_2", divides=False), "NVFP4",
    ),
    "FP8 of tensors, ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        fp8(".weight_scale", "tensor", static=True), "FP8",
    ),
    "LLM.int8()": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8, "INT8"),
}  # fmt: skip

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCAB = 128, 256, 2, 4, 2, 512


def write_model(
    kind: str, tokenizer: Path, folder: Path, *, rounded: bool = False
) -> tuple[Path, Path]:
    """A random Llama of that kind, and its twin of the same values in float32 (or in bf16)."""
    settings, make, _ = KINDS[kind]
    rng = np.random.default_rng(5)
    small: dict[str, Any] = {}
    wide: dict[str, Any] = {}
    head_dim = HIDDEN // HEADS
    rows = {"q": HIDDEN, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim, "o": HIDDEN}
    matrices = {f"self_attn.{x}_proj": (n, HIDDEN) for x, n in rows.items()}
    matrices |= {f"mlp.{x}_proj": (FFN, HIDDEN) for x in ("gate", "up")}
    matrices["mlp.down_proj"] = (HIDDEN, FFN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for module, (n, k) in matrices.items():
            tensors, values = make(rng, n, k)
            name = f"{prefix}{module}.weight"
            wide[name] = ("BF16", (n, k), to_bf16(values)) if rounded else values.astype("f4")
            small |= {f"{prefix}{module}{suffix}": t for suffix, t in tensors.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            small[f"{prefix}{norm}.weight"] = np.ones(HIDDEN, np.float32)
    small["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    small["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, HIDDEN), np.float32)
    wide |= {name: t for name, t in small.items() if isinstance(t, np.ndarray)}
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
    }
    out = []
    for name, tensors, more in (
        ("small", small, {"quantization_config": settings}),
        ("wide", wide, {}),
    ):
        path = folder / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config | more))
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, path)
        write_safetensors(path / "model.safetensors", tensors)
        out.append(path)
    return out[0], out[1]
