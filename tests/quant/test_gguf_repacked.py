"""IQ4_NL, IQ4_XS and NVFP4 of GGUF: the values that the gguf package reads, element for element."""

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest

from engineroom import LLM
from engineroom.engine.config import ConfigError
from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint
from engineroom.engine.tools.quantize import QuantizeConfig
from engineroom.engine.tools.quantize_gguf import quantize_gguf
from engineroom.engine.tools.texts import Text
from engineroom.quant.gguf import block_dtype
from engineroom.quant.gguf_repacked import IQ4_VALUES, REPACKED, Repacked
from engineroom.quant.values import dequantise
from tests.counts import count
from tests.data import data_path
from tests.load.stories260k import convert
from tests.load.writers import write_gguf

kinds = pytest.mark.parametrize("kind", REPACKED.values(), ids=REPACKED)


def theirs(kind: Repacked, raw: np.ndarray, columns: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = raw.view(np.uint8).reshape(-1, kind.stored.row_bytes(columns))
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.stored.name])


def random_blocks(kind: Repacked, n: int, seed: int) -> np.ndarray:
    """Every bit random, but a float16 scale is one of ordinary numbers."""
    rng = np.random.default_rng(seed)
    raw = rng.bytes(n * kind.stored.block_bytes)
    blocks = np.frombuffer(raw, block_dtype(kind.stored)).copy()
    if "d" in blocks.dtype.names:
        values = rng.standard_normal(blocks["d"].shape) * 10.0 ** rng.integers(-6, 4)
        blocks["d"] = values.astype(np.float16)
    return blocks


@kinds
def test_random_blocks(kind: Repacked) -> None:
    for seed in range(count(reduced=5, full=100)):
        columns = (256, 768)[seed % 2]
        raw = random_blocks(kind, 6 * columns // kind.stored.block_elements, seed).view(np.uint8)
        weight = kind.weight("w", (6, columns), raw)
        want = theirs(kind, raw, columns)
        np.testing.assert_array_equal(dequantise(weight), want)
        np.testing.assert_array_equal(dequantise(weight.rows(1, 5).rows(2, 4)), want[3:5])


@kinds
def test_every_code_and_every_byte_of_a_scale(kind: Repacked) -> None:
    blocks = np.zeros(256, block_dtype(kind.stored))
    for name in blocks.dtype.names:
        if name == "d":
            blocks[name] = np.float16(0.125)
        else:
            field = blocks[name].view(np.uint8)
            field[:] = np.arange(256, dtype=np.uint8)[:, None] + np.arange(field.shape[1])
    columns = kind.stored.block_elements
    got = dequantise(kind.weight("w", (256, columns), blocks.view(np.uint8)))
    np.testing.assert_array_equal(got, theirs(kind, blocks, columns))


def file_of(path: Path, kind: Repacked, shape: tuple[int, ...], scale: np.ndarray) -> Path:
    raw = random_blocks(kind, int(np.prod(shape)) // kind.stored.block_elements, 3).tobytes()
    tensors = {
        "w.weight": (kind.stored.name, shape, raw),
        "w.scale": ("F32", scale.shape, scale.astype("<f4").tobytes()),
        "w.input_scale": ("F32", (1,), np.ones(1, "<f4").tobytes()),
    }
    return write_gguf(path, {"general.architecture": "llama"}, tensors)


@pytest.mark.parametrize("scale", [[0.75], [0.5, 2, 3]])
def test_a_scale_beside_nvfp4_multiplies_all_of_it_or_each_expert(
    scale: list[float], tmp_path: Path
) -> None:
    kind = REPACKED["NVFP4"]
    c = open_checkpoint(file_of(tmp_path / "m.gguf", kind, (3, 4, 128), np.array(scale)))
    assert c.tensor_names == ("w.weight",)
    assert c.quantised
    raw = random_blocks(kind, 24, 3).view(np.uint8)
    want = theirs(kind, raw, 128).reshape(3, 4, 128) * np.array(scale, np.float32)[:, None, None]
    np.testing.assert_array_equal(dequantise(c.tensor("w.weight")), want)


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "m.gguf", REPACKED["NVFP4"], (3, 4, 128), np.ones(2))
    with pytest.raises(CheckpointError, match="or one for each of its experts"):
        open_checkpoint(path).tensor("w.weight")


def test_scales_beside_other_types_are_not_hidden(tmp_path: Path) -> None:
    c = open_checkpoint(file_of(tmp_path / "m.gguf", REPACKED["IQ4_NL"], (4, 128), np.ones(1)))
    assert set(c.tensor_names) == {"w.weight", "w.scale", "w.input_scale"}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """stories260K with its matrices in IQ4_NL, and the same values in F32."""
    place = tmp_path_factory.mktemp("iq4")
    source = convert(data_path("stories260K/stories260K.bin").parent, place)["F32"]
    reader = open_checkpoint(source)
    small, wide = {}, {}
    for name in reader.tensor_names:
        values = dequantise(reader.tensor(name))
        wide[name] = ("F32", values.shape, values.tobytes())
        small[name] = wide[name]
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            groups = values.reshape(-1, 32)
            d = (np.abs(groups).max(axis=1) / 127).astype(np.float16)
            size = np.maximum(d.astype(np.float32), 1e-9)[:, None, None]
            code = np.abs(groups[..., None] / size - IQ4_VALUES).argmin(axis=2).astype(np.uint8)
            blocks = np.zeros(len(groups), block_dtype(REPACKED["IQ4_NL"].stored))
            blocks["d"][:, 0] = d
            blocks["nibbles"] = code[:, :16] | code[:, 16:] << 4
            small[name] = ("IQ4_NL", values.shape, blocks.tobytes())
            made = d.astype(np.float32)[:, None] * IQ4_VALUES[code].astype(np.float32)
            wide[name] = ("F32", values.shape, made.tobytes())
    metadata = {key: reader.metadata[key] for key in reader.metadata}
    return tuple(
        write_gguf(place / f"{name}.gguf", metadata, tensors)
        for name, tensors in (("small", small), ("wide", wide))
    )


def test_a_file_of_iq4_nl_answers_as_its_values_do(stories: tuple[Path, Path]) -> None:
    options = {"dtype": "float32", "activations": "float32", "kv_cache_dtype": "float32"}
    scores = []
    for path in stories:
        with LLM(str(path), device="cpu", max_num_seqs=1, max_model_len=64, **options) as llm:
            scores.append(
                np.concatenate([rows for _, rows in llm.score_stream("Once upon a time")])
            )
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-4)


def test_a_file_of_them_is_not_quantised_again(stories: tuple[Path, Path], tmp_path: Path) -> None:
    config = QuantizeConfig(str(stories[0]), str(tmp_path / "out.gguf"), "rtn", "Q4_0")
    with pytest.raises(ConfigError, match="cannot be written as they are"):
        quantize_gguf(config, Text("none", ""))
