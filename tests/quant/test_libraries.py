"""Published weights read here equal what the format's own library makes of the same tensors.

compressed-tensors compresses random and hostile weights, and what it decompresses is compared
element for element. bitsandbytes is held so in double quantisation and
LLM.int8() (its NF4 packing: test_small_floats.py), gguf in test_gguf_dequantise.py. GPTQModel and
AutoAWQ pack and dequantise on the CPU; their modules are asked for by themselves, because neither
package's requirements (newer torch; older transformers) agree with the other libraries'.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.quant.values import dequantise
from tests.load.published import ct, gptq_config
from tests.load.writers import write_safetensors

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="the libraries need torch")

_DTYPES = {"torch.uint8": "U8", "torch.int8": "I8", "torch.int32": "I32", "torch.int64": "I64"}
_DTYPES |= {
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
}


def hostile(rows: int, columns: int) -> Any:
    """A row and a group of zeros, one outlier, tiny values, one sign, negative zeros."""
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((rows, columns), np.float32))
    x[0] = 0
    x[1, :128] = 0
    x[2, columns // 2] = 1000
    x[3] = x[3].abs()
    x[4] *= 1e-30
    x[5, ::2] = -0.0
    return x


def read(folder: Path, settings: Any, tensors: dict[str, Any]) -> np.ndarray:
    """The values of module m's weight, its columns as the input has them."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    made: dict[str, Any] = {"norm": np.ones(2, np.float32)}
    for name, t in tensors.items():
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        made[f"m.{name}"] = (_DTYPES[str(t.dtype)], tuple(t.shape), raw)
    write_safetensors(folder / "model.safetensors", made)
    weight = open_checkpoint(folder).tensor("m.weight")
    values = dequantise(weight)
    if weight.columns is None:
        return values
    out = np.empty_like(values)
    out[:, weight.columns] = values
    return out


INTEGERS = [
    ("pack-quantized", {"num_bits": 4, "group_size": 128, "strategy": "group"}),
    ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
    ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("pack-quantized", {"num_bits": 8, "group_size": 64, "strategy": "group", "symmetric": False}),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
]


def scheme_of(arguments: dict[str, Any]) -> Any:
    quantization = pytest.importorskip(
        "compressed_tensors.quantization", reason="compressed-tensors is not installed"
    )
    weights = quantization.QuantizationArgs(**arguments)
    return quantization.QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize(("form", "arguments"), INTEGERS)
@pytest.mark.parametrize("columns", [384, 640])
def test_integers_of_compressed_tensors(
    form: str, arguments: dict[str, Any], columns: int, tmp_path: Path
) -> None:
    scheme = scheme_of(arguments)
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    x, size = hostile(48, columns), arguments.get("group_size") or columns
    groups = x.reshape(48, -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    scale = scale.to(torch.bfloat16).float()  # as checkpoints have them: d q - d zero is exact
    state = {"weight": x, "weight_scale": scale, "weight_zero_point": zero}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    want = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    got = read(tmp_path / "m", ct(form, **arguments), packed)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("columns", [384, 640])
def test_mxfp4_of_compressed_tensors(columns: int, tmp_path: Path) -> None:
    arguments = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
    scheme = scheme_of(arguments)
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor

    x = hostile(48, columns)
    largest = x.reshape(48, -1, 32).abs().amax(-1)
    scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-30))) - 2)
    state = {"weight": x, "weight_scale": scale}
    packed = MXFP4PackedCompressor.compress(state, scheme)
    want = MXFP4PackedCompressor.decompress(packed, scheme)["weight"]
    settings = ct("mxfp4-pack-quantized", **arguments)
    got = read(tmp_path / "m", settings, packed)
    np.testing.assert_array_equal(got, want.float().numpy())


@pytest.mark.parametrize("columns", [384, 640])
def test_nvfp4_of_compressed_tensors(columns: int, tmp_path: Path) -> None:
    """It gives bfloat16: our float32 values, rounded, are those."""
    arguments = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
    scheme = scheme_of(arguments)
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

    x = hostile(48, columns)
    whole = (448 * 6 / x.abs().max()).reshape(1)
    largest = x.reshape(48, -1, 16).abs().amax(-1)
    scale = (largest / 6 * whole).clamp(max=448).to(torch.float8_e4m3fn).float()
    scale = torch.where(scale == 0, torch.tensor(2.0**-9), scale)
    state = {"weight": x, "weight_scale": scale, "weight_global_scale": whole}
    packed = NVFP4PackedCompressor.compress(state, scheme)
    want = NVFP4PackedCompressor.decompress(packed, scheme)["weight"]
    got = read(tmp_path / "m", ct("nvfp4-pack-quantized", **arguments), packed)
    np.testing.assert_array_equal(
        torch.from_numpy(got).to(torch.bfloat16).float().numpy(), want.float().numpy()
    )


@pytest.mark.parametrize("columns", [384, 640])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(kind: str, columns: int, double: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    x = hostile(48, columns)
    packed, state = functional.quantize_4bit(
        x, blocksize=64, quant_type=kind, compress_statistics=double
    )
    tensors = {"weight": packed}
    for name, value in state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = value
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
    }
    got = read(tmp_path / "m", settings, tensors)
    np.testing.assert_array_equal(got, functional.dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("columns", [384, 640])
def test_llm_int8_of_bitsandbytes(columns: int, tmp_path: Path) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    x = hostile(48, columns).half()
    codes, largest, _ = functional.int8_vectorwise_quant(x)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    got = read(tmp_path / "m", settings, {"weight": codes, "SCB": largest})
    want = codes.float() * (largest.float() / 127)[:, None]
    np.testing.assert_array_equal(got, want.numpy())


def grids(x: Any, index: Any, bits: int) -> tuple[Any, Any]:
    """Scale (float16 numbers) and zero point [N, G] of the groups that columns `index` are of."""
    most = (1 << bits) - 1
    groups = range(int(index.max()) + 1)
    low = torch.stack([x[:, index == g].amin(1) for g in groups], 1).clamp(max=0)
    high = torch.stack([x[:, index == g].amax(1) for g in groups], 1).clamp(min=0)
    scale = ((high - low) / most * 1.001).clamp(min=1e-4).half().float()
    return scale, (-low / scale).round().clamp(0, most)


def linear_of(x: Any) -> Any:
    linear = torch.nn.Linear(x.shape[1], x.shape[0], bias=False)
    linear.weight.data = x.clone()
    return linear


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_of_gptqmodel(
    bits: int, group: int, act_order: bool, version: int, tmp_path: Path
) -> None:
    """Zero points of 0 are among them, which version 1 stores as what borrows from the next."""
    reason = "gptqmodel is not installed"
    theirs = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason=reason)
    convert = importlib.import_module("gptqmodel.utils.model")
    x = hostile(64, 384)
    index = torch.zeros(384, dtype=torch.int32) if group == -1 else torch.arange(384) // group
    if act_order:
        index = index[torch.from_numpy(np.random.default_rng(7).permutation(384))]
    index = index.to(torch.int32)
    scale, zero = grids(x, index, bits)
    assert (zero == 0).any()
    assert (zero > 0).any()
    module = theirs.TorchLinear(
        bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=384,
        out_features=64, bias=False, pack_dtype=torch.int32,
    )  # fmt: skip
    module.pack_original(linear_of(x), scale, zero.to(torch.int32), index)
    if version == 1:
        convert.convert_gptq_v2_to_v1_format_module(module, types.SimpleNamespace(
            bits=bits, pack_dtype=torch.int32
        ))  # fmt: skip
    names = ("qweight", "qzeros", "scales", "g_idx")
    packed = {name: getattr(module, name).clone() for name in names}
    if version == 1:
        convert.convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.scales = module.scales.float()  # so that their product is not rounded to float16
    module.post_init()
    want = module.dequantize_weight().T.float()
    name = "gptq" if version == 1 else "gptq_v2"
    settings = gptq_config(bits, group, checkpoint_format=name)
    np.testing.assert_array_equal(read(tmp_path / "m", settings, packed), want.numpy())


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("columns", [384, 640])
def test_integers_of_autoawq(
    group: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its __init__ needs an older transformers, so that its packing is imported around it."""
    try:
        place = importlib.util.find_spec("awq")
    except ValueError:
        place = None
    if place is None or not place.submodule_search_locations:
        pytest.skip("autoawq is not installed")
    root = Path(next(iter(place.submodule_search_locations)))
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    gemm = importlib.import_module("awq.modules.linear.gemm")
    x = hostile(64, columns)
    index = torch.arange(columns) // group
    scale, zero = grids(x, index, 4)
    module = gemm.WQLinear_GEMM.from_linear(
        linear_of(x), 4, group, scales=scale.T.contiguous(), zeros=zero.T.contiguous()
    )
    packed = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    settings = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
    got = read(tmp_path / "m", {**settings, "group_size": group}, packed)
    wide = module.scales.float()  # so that their product is not rounded to float16
    want = gemm.dequantize_gemm(module.qweight, module.qzeros, wide, 4, group).T
    np.testing.assert_array_equal(got, want.numpy())
