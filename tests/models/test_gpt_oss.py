"""gpt-oss as it is published, its experts in MXFP4: what transformers reads of the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.kernels.weights import BF16, F32, RawWeight
from tests.counts import FULL
from tests.models import tiny as cases
from tests.models.test_logits import TOLERANCE
from tests.models.tiny import GPT_OSS, PROMPT, Case, prompt

torch = pytest.importorskip("torch", reason="the reference backend needs torch")

from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint  # noqa: E402
from engineroom.engine.models import record  # noqa: E402
from engineroom.engine.runtime import reorder  # noqa: E402
from engineroom.engine.runtime.load import open_model, raw_weights  # noqa: E402
from engineroom.kernels.backend import KVSpec  # noqa: E402
from tests.models.harness import Model, Piece, step_inputs  # noqa: E402

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
WHOLE_GROUPS = Case(
    "GptOss",
    {**GPT_OSS, "hidden_size": 96, "intermediate_size": 64},
    spread={"gate_up_proj": 8.0},
)
METHOD = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def in_mxfp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[E, K, N] as the blocks [E, N, K / 32, 16] and scales [E, N, K / 32] of a checkpoint."""
    groups = values.swapaxes(1, 2).reshape(values.shape[0], values.shape[2], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1))).astype(int) - 2
    scaled = groups / np.exp2(exponent)[..., None]
    codes = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1) + 8 * (scaled < 0)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks.astype(np.uint8), (exponent + 127).astype(np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, np.ndarray]]:
    """A folder as it is published, and transformers' logits of `prompt()`."""
    import transformers
    from safetensors.numpy import load_file, save_file

    folder, first = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "float"))
    cases.CASES["gpt-oss of whole groups"] = WHOLE_GROUPS
    try:
        cases.make("gpt-oss of whole groups", first)
    finally:
        del cases.CASES["gpt-oss of whole groups"]
    config = json.loads((first / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": METHOD}))
    tensors: dict[str, np.ndarray] = {}
    for name, values in load_file(first / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = in_mxfp4(values)
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).float()
    with torch.no_grad():
        yield folder, model(input_ids=torch.tensor([prompt()])).logits[0].numpy()


def test_logits_equal_transformers_on_the_same_file(published: tuple[Path, np.ndarray]) -> None:
    folder, want = published
    ours = Model(folder).prompt(prompt())
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)


def bound(folder: Path, backend: Any) -> Any:
    checkpoint = open_checkpoint(folder)
    module, config = open_model(checkpoint)
    config = config.replace(dtype="float32")
    raw = raw_weights(checkpoint, module, config)
    packed = {name: backend.pack(weight) for name, weight in raw.items()}
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, "float32")
    return backend.lower(record(module, config), packed, backend.allocate_kv(spec, 16))


def test_the_cpu_is_the_reference_at_1_7_and_64_tokens(published: tuple[Path, np.ndarray]) -> None:
    """One program, several sequences: rows are those of a sequence alone, bit for bit."""
    from engineroom.kernels.cpu.backend import CpuBackend

    folder, want = published
    run = bound(folder, CpuBackend(activations="float32"))
    whole = run.run(step_inputs([Piece(prompt(), (3, 0, 2))], 16)).numpy().copy()
    np.testing.assert_allclose(whole, want, rtol=0, atol=1e-4)
    others = [Piece(prompt(n, n), (4 + i,)) for i, n in enumerate((12, 11, 1))]
    packed = run.run(step_inputs([Piece(prompt(), (9, 8, 10)), *others], 16)).numpy()
    assert len(packed) == 64 and packed[:PROMPT].tobytes() == whole.tobytes()
    run.run(step_inputs([Piece(prompt()[:32], (13, 12, 14))], 16))
    seven = run.run(step_inputs([Piece(prompt()[32:39], (13, 12, 14), 32)], 16)).numpy()
    assert seven.tobytes() == whole[32:39].tobytes()
    one = run.run(step_inputs([Piece(prompt()[39:], (13, 12, 14), 39)], 16)).numpy()
    assert one.tobytes() == whole[39:].tobytes()


def test_int8_activations_are_near(published: tuple[Path, np.ndarray]) -> None:
    """Experts' inputs in 8 bits; near a tie a token may take another expert."""
    from engineroom.kernels.cpu.backend import CpuBackend

    folder, want = published
    run = bound(folder, CpuBackend())
    got = run.run(step_inputs([Piece(prompt(), (3, 0, 2))], 16)).numpy()
    assert 1e-6 < np.median(np.abs(got - want).mean(1)) < 0.03 * np.abs(want).mean()


@pytest.mark.parametrize("dtype", ["float16", *FULL * ["float32"]])
def test_triton_is_the_reference(published: tuple[Path, np.ndarray], dtype: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")
    from tests.kernels.triton_device import TritonBackend

    folder, want = published
    run = bound(folder, TritonBackend(activation_dtype=dtype, threads=1))
    got = run.run(step_inputs([Piece(prompt()[:11], (3, 0))], 16)).numpy()
    far = np.abs(got - want[:11]).max(1) / np.abs(want).max()
    assert np.median(far) < {"float32": 1e-5, "float16": 1e-2}[dtype]
    assert (far > {"float32": 1e-4, "float16": 5e-2}[dtype]).sum() <= (dtype == "float16")


def test_a_bf16_checkpoint_is_the_same_model(
    published: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    """As transformers dequantises it: matrices transposed, every value of MXFP4 one of bf16."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, want = published
    shutil.copy(folder / "config.json", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(folder / "model.safetensors")
    tensors = {n: t for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    for name in [n.removesuffix("_blocks") for n in stored if n.endswith("_blocks")]:
        made = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        tensors[name] = made.to(torch.bfloat16).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    ours = Model(tmp_path).prompt(prompt())
    np.testing.assert_allclose(ours, want, rtol=0, atol=TOLERANCE)


def test_a_matrix_of_another_shape_is_named(
    published: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    folder, _ = published
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"][:, :-1].copy()
    tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\[5, 95, 64\]; by the configuration .*down_exp"):
        Model(tmp_path)


@pytest.mark.parametrize("fmt", [F32, BF16], ids=["F32", "BF16"])
def test_rows_are_those_of_the_transposes_in_any_range(fmt: Any) -> None:
    size = fmt.block_bytes
    values = np.random.default_rng(1).integers(0, 99, (3, 5, 8)).astype(f"u{size}")
    stored = RawWeight("w", fmt, (3, 5, 8), {"data": values.reshape(-1).view(np.uint8)})
    rows = values.swapaxes(1, 2).reshape(24, 5)
    made = reorder.transposed(stored)
    halves = reorder.in_turns(made, 2)
    turned = np.concatenate([rows[0::2], rows[1::2]])
    vector = RawWeight("b", fmt, (24,), {"data": rows[:, 0].copy().view(np.uint8)})
    elements = reorder.in_turns(vector, 2)
    of: Callable[[RawWeight], np.ndarray] = lambda w: w.data.view(f"u{size}")  # noqa: E731
    for a in range(24):
        for b in range(a + 1, 25):
            assert np.array_equal(of(made.rows(a, b)).reshape(-1, 5), rows[a:b])
            assert np.array_equal(of(halves.rows(a, b)).reshape(-1, 5), turned[a:b])
            assert np.array_equal(of(elements.rows(a, b)), turned[a:b, 0])
    assert np.array_equal(of(halves).reshape(-1, 5), turned)
    assert np.array_equal(of(elements), turned[:, 0])
