"""The GGUF reader: what sound files hold is read exactly, and bad headers are refused by field."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engineroom.engine.load.checkpoint import open_checkpoint
from engineroom.engine.load.gguf import GgufFile
from engineroom.engine.load.mapped import CheckpointError
from engineroom.kernels.weights import FILE_FORMATS
from tests.counts import FULL, count
from tests.data import data_path, model_path
from tests.load.writers import (
    Typed,
    gguf_head,
    gguf_pair,
    gguf_string,
    gguf_tensor_info,
    write_gguf,
)

ARCH = {"general.architecture": "llama"}
VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<0x0A>", "▁été", ""],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.25, float("-inf")],
    "tokenizer.ggml.token_type": [2, 6, 1, 1],
}


def random_bytes(seed: int, fmt: str, shape: tuple[int, ...]) -> bytes:
    n = int(np.prod(shape[:-1])) * FILE_FORMATS[fmt].row_bytes(shape[-1])
    return np.random.default_rng(seed).bytes(n)


def package_values(path: Path) -> dict[str, object]:
    """Metadata as the gguf package reads it, its own GGUF.* entries left out."""
    fields = gguf.GGUFReader(path).fields
    return {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}


def write_with_package(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A file by the gguf package's writer: every value type and every supported tensor type."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint8("t.uint8", 255)
    w.add_int8("t.int8", -128)
    w.add_uint16("t.uint16", 65535)
    w.add_int16("t.int16", -32768)
    w.add_uint32("t.uint32", 2**32 - 1)
    w.add_int32("t.int32", -(2**31))
    w.add_uint64("t.uint64", 2**64 - 1)
    w.add_int64("t.int64", -(2**63))
    w.add_float32("t.float32", 0.1)
    w.add_float64("t.float64", 0.1)
    w.add_bool("t.bool", True)
    w.add_string("t.string", "naïve ☃")
    w.add_array("t.ints", [1, -2, 3])
    w.add_array("t.floats", [0.5, -0.25])
    w.add_array("t.bools", [True, False, True])
    w.add_array("t.texts", ["a", "", "日本"])
    w.add_block_count(2)
    w.add_custom_alignment(64)
    tensors = {}
    for i, fmt in enumerate(FILE_FORMATS):
        shape = [(512,), (3, 256), (2, 3, 256), (2, 1, 2, 256)][i % 4]
        raw = random_bytes(i, fmt, shape)
        tensors[f"tensor.{fmt}"] = (fmt, shape, raw)
        rows = np.frombuffer(raw, np.uint8).reshape(*shape[:-1], -1)
        w.add_tensor(f"tensor.{fmt}", rows, raw_dtype=gguf.GGMLQuantizationType[fmt])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return tensors


def assert_reads_as_package(path: Path) -> None:
    ours, package = GgufFile(path), gguf.GGUFReader(path)
    theirs = package_values(path)
    assert list(ours.metadata) == list(theirs)
    for key, value in theirs.items():
        mine = ours.metadata[key]
        assert repr(mine) == repr(value), key  # repr: NaN equals NaN, True is not 1
    assert list(ours.tensors) == [t.name for t in package.tensors]
    for t in package.tensors:
        weight = ours.tensor(t.name)
        assert weight.format.name == t.tensor_type.name
        assert weight.shape == tuple(reversed(t.shape.tolist()))
        assert weight.data.tobytes() == t.data.tobytes()
    del weight
    ours.close()


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    written = write_with_package(tmp_path / "a.gguf")
    assert_reads_as_package(tmp_path / "a.gguf")
    file = GgufFile(tmp_path / "a.gguf")
    assert set(file.tensors) == set(written)
    for name, (fmt, shape, raw) in written.items():
        weight = file.tensor(name)
        assert (weight.format.name, weight.shape) == (fmt, shape)
        assert weight.data.tobytes() == raw
        assert file.tensors[name].offset % 64 == 0
    assert file.metadata["t.uint64"] == 2**64 - 1
    assert file.metadata["t.bool"] is True
    assert file.metadata["t.bools"] == [True, False, True]
    assert file.metadata["t.float32"] == np.float32(0.1)
    assert file.metadata.type_of("t.texts") == "array of string"


@pytest.mark.parametrize("version", [2, 3])
def test_our_test_writer_is_read_the_same_by_the_package(tmp_path: Path, version: int) -> None:
    tensors = {"a": ("Q8_0", (2, 64), bytes(136)), "b": ("F32", (3,), bytes(12))}
    path = write_gguf(
        tmp_path / "a.gguf", ARCH | VOCABULARY, tensors, version=version, alignment=128
    )
    assert_reads_as_package(path)


def test_a_tensor_is_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", ARCH, {"w": ("F32", (2, 3), bytes(range(24)))})
    file = GgufFile(path)
    weight = file.tensor("w")
    assert weight.shape == (2, 3) and weight.name == "w"
    assert not weight.data.flags.writeable
    assert np.shares_memory(weight.data, file.file.view(file.tensors["w"].offset, 24))
    file.close()
    file.close()
    assert weight.data.tobytes() == bytes(range(24)), "a view outlives close()"
    with pytest.raises(CheckpointError, match="was closed"):
        file.tensor("w")


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    pair = gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3)
    tokens = [b"\xe9t\xe9", b"a\0b", "é".encode()[:1]]
    pair += b"".join(gguf_string(t) for t in tokens)
    author = gguf_string("general.author") + struct.pack("<I", 8) + gguf_string(b"Andr\xe9")
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_head(0, 3) + gguf_pair("general.architecture", "llama") + pair + author)
    metadata = GgufFile(path).metadata
    texts = metadata["tokenizer.ggml.tokens"]
    assert [t.encode("utf-8", "surrogateescape") for t in texts] == tokens
    assert metadata["general.author"] == "Andr\\xe9"


def test_metadata_counts_without_decoding(tmp_path: Path) -> None:
    metadata = GgufFile(write_gguf(tmp_path / "a.gguf", ARCH | VOCABULARY, {})).metadata
    assert metadata.count("tokenizer.ggml.tokens") == 4
    assert metadata.count("general.architecture") == 1
    assert metadata.numbers("tokenizer.ggml.scores").dtype == np.float32
    with pytest.raises(CheckpointError, match="not an array of numbers"):
        metadata.numbers("tokenizer.ggml.tokens")
    with pytest.raises(KeyError):
        metadata["tokenizer.ggml.token"]


def test_arrays_are_decoded_anew_and_never_kept(tmp_path: Path) -> None:
    metadata = GgufFile(write_gguf(tmp_path / "a.gguf", ARCH | VOCABULARY, {})).metadata
    first = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.tokens"] == first
    assert metadata["tokenizer.ggml.tokens"] is not first
    assert metadata.count("tokenizer.ggml.tokens") == 4


def test_an_unknown_tensor_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = GgufFile(
        write_gguf(tmp_path / "a.gguf", ARCH, {"blk.0.attn_q": ("F32", (1,), bytes(4))})
    )
    with pytest.raises(CheckpointError, match=r"no tensor 'blk.0.attn_k'.*'blk.0.attn_q'") as error:
        file.tensor("blk.0.attn_k")
    assert error.value.field == "blk.0.attn_k"


F32_1 = ("F32", (1,), bytes(4))
ENTRY = gguf_pair("general.architecture", "llama")

BAD: dict[str, tuple[bytes, str, str]] = {
    # id: file, field, words of the message
    "magic": (b"GGJT" + bytes(60), "magic", "not a GGUF file"),
    "version 1": (gguf_head(0, 0, 1), "version", "convert the model again"),
    "version 4": (gguf_head(0, 0, 4), "version", "versions 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version", "big-endian"),
    "empty key": (gguf_head(0, 1) + gguf_string("") + bytes(16), "key 0 length", "1..65535"),
    "long key": (gguf_head(0, 1) + gguf_string("k" * 65536) + bytes(16), "key 0 length", "65536"),
    "key not UTF-8": (gguf_head(0, 1) + gguf_string(b"\xff") + bytes(16), "key 0", "not UTF-8"),
    "key twice": (gguf_head(0, 2) + ENTRY + ENTRY, "general.architecture", "twice"),
    "value type": (gguf_head(0, 1) + gguf_string("k") + struct.pack("<IQ", 13, 0), "k type", "13"),
    "element type": (
        gguf_head(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 99, 0),
        "k type",
        "99",
    ),
    "array of arrays": (
        gguf_head(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 0),
        "k",
        "array of arrays",
    ),
    "bool of 2": (gguf_head(0, 1) + gguf_string("k") + struct.pack("<IB", 7, 2), "k", "bool of 2"),
    "long text": (
        gguf_head(0, 1) + gguf_string("k") + struct.pack("<IQ", 8, 2**26 + 1),
        "k length",
        "at most 67108864",
    ),
    "alignment 48": (
        gguf_head(0, 2) + ENTRY + gguf_pair("general.alignment", 48),
        "general.alignment",
        "power of two",
    ),
    "alignment uint64": (
        gguf_head(0, 2) + ENTRY + gguf_pair("general.alignment", Typed("uint64", 32)),
        "general.alignment",
        "must be uint32",
    ),
    "architecture of odd characters": (
        gguf_head(0, 1) + gguf_pair("general.architecture", "ll ama"),
        "general.architecture",
        "no name",
    ),
    "split": (
        gguf_head(0, 2) + ENTRY + gguf_pair("split.count", Typed("uint16", 3)),
        "split.count",
        "one of 3 parts",
    ),
    "n_dims 0": (
        gguf_head(1, 1) + ENTRY + gguf_string("w") + bytes(32),
        "w n_dims",
        "0 dimensions",
    ),
    "n_dims 5": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (1,) * 5, 0, 0),
        "w n_dims",
        "5 dimensions",
    ),
    "dimension 0": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (2, 0), 0, 0),
        "w dims",
        "dimension of 0",
    ),
    "tensor type known": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (256,), 10, 0),
        "w type",
        "Q2_K is not supported (supported: F32, F16, BF16, Q4_0",
    ),
    "tensor type unknown": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (256,), 77, 0),
        "w type",
        "number 77",
    ),
    "partial block": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (33,), 8, 0) + bytes(99),
        "w dims",
        "blocks of 32 elements",
    ),
    "unaligned": (
        gguf_head(1, 1) + ENTRY + gguf_tensor_info("w", (1,), 0, 4) + bytes(99),
        "w offset",
        "alignment 32",
    ),
    "tensor twice": (
        gguf_head(2, 1) + ENTRY + gguf_tensor_info("w", (1,), 0, 0) * 2 + bytes(99),
        "w",
        "twice",
    ),
    "overlap": (
        gguf_head(2, 1)
        + ENTRY
        + gguf_tensor_info("v", (9,), 0, 0)
        + gguf_tensor_info("w", (1,), 0, 32)
        + bytes(99),
        "w offset",
        "within tensor 'v'",
    ),
    "token_type short": (
        gguf_head(0, 3)
        + ENTRY
        + gguf_pair("tokenizer.ggml.tokens", ["a", "b"])
        + gguf_pair("tokenizer.ggml.token_type", [1]),
        "tokenizer.ggml.token_type",
        "1 entries for 2 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused_by_field(tmp_path: Path, case: str) -> None:
    raw, field, words = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        GgufFile(path)
    assert error.value.field == field
    assert words in str(error.value) and "bad.gguf" in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = sound_file(tmp_path / "a.gguf")
    path = tmp_path / "b.gguf"
    last = max(t.offset + t.nbytes for t in GgufFile(tmp_path / "a.gguf").tensors.values())
    for n in range(last):  # behind the last tensor only padding may follow
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            GgufFile(path)


def sound_file(path: Path) -> bytes:
    extra = {
        "x.flags": [True, False],
        "x.big": Typed("uint64", 7),
        "x.ratio": Typed("float64", 1.5),
    }
    tensors = {
        "token_embd.weight": ("Q8_0", (4, 32), random_bytes(0, "Q8_0", (4, 32))),
        "output_norm.weight": ("F32", (32,), random_bytes(1, "F32", (32,))),
        "blk.0.attn_q.weight": ("F16", (3, 5), random_bytes(2, "F16", (3, 5))),
    }
    metadata = ARCH | {"llama.block_count": 1} | VOCABULARY | extra
    return write_gguf(path, metadata, tensors).read_bytes()


@settings(
    max_examples=count(reduced=400, full=5_000),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    cut=st.floats(0, 1) | st.none(),
)
@example(flips=[], cut=None)
def test_flipped_and_cut_files_are_refused_or_read_as_the_package_reads_them(
    tmp_path: Path, flips: list[tuple[float, int]], cut: float | None
) -> None:
    raw = bytearray(sound_file(tmp_path / "a.gguf"))
    # flips go where they can matter
    header = min(t.offset for t in GgufFile(tmp_path / "a.gguf").tensors.values())
    for place, value in flips:
        raw[int(place * header)] = value
    if cut is not None:
        raw = raw[: int(cut * len(raw))]
    path = tmp_path / "b.gguf"
    path.write_bytes(bytes(raw))
    try:
        file = GgufFile(path)
        values = {key: file.metadata[key] for key in file.metadata}
        tensors = {name: file.tensor(name) for name in file.tensors}
    except CheckpointError as error:
        assert error.field
        return
    assert all(w.data.nbytes == w.nbytes for w in tensors.values())
    assert "general.architecture" in values
    if all(is_utf8(v) for v in [*values, *values.values(), *tensors]):
        assert_reads_as_package(path)


def is_utf8(value: object) -> bool:
    """The package replaces bytes that are not UTF-8; we keep them."""
    texts = value if isinstance(value, list) else [value]
    return not any("\\x" in ascii(t) or "\\ud" in ascii(t) for t in texts if isinstance(t, str))


def test_vocabulary_files_of_the_test_data_open() -> None:
    files = sorted(data_path("vocab").glob("*.gguf"))
    assert files
    for path in files:
        file = GgufFile(path)
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == len(file.metadata["tokenizer.ggml.token_type"]) > 1000, path
        file.close()


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_real_model_is_read_as_the_package_reads_it(name: str) -> None:
    path = model_path(name)
    if not FULL:
        pytest.skip(
            "the gguf package takes 5 to 25 s for a whole vocabulary: only in `make test-all`"
        )
    ours, package = GgufFile(path), gguf.GGUFReader(path)
    assert list(ours.tensors) == [t.name for t in package.tensors]
    for t in package.tensors:
        info = ours.tensors[t.name]
        assert info.offset == t.data_offset and info.nbytes == t.n_bytes
        assert info.format.name == t.tensor_type.name
        assert info.shape == tuple(reversed(t.shape.tolist()))
    for key, field in package.fields.items():
        if key.startswith("GGUF."):
            continue
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            assert ours.metadata[key] == field.contents(), key
            continue
        mine = ours.metadata[key]
        assert len(mine) == len(field.data)
        for i in range(0, len(mine), 997):  # the package is slow on whole vocabularies
            assert mine[i] == field.contents(i), (key, i)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages as Linux tells")
def test_pages_let_go_are_no_longer_resident_and_read_again(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype="<f4")
    tensor = {"w": ("F32", values.shape, values.tobytes())}
    path = write_gguf(tmp_path / "let-go.gguf", ARCH, tensor)
    checkpoint = open_checkpoint(path)
    data = checkpoint.tensor("w").data

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if line.endswith(path.name))
        return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:"))

    want = data.sum()  # reads all of it
    assert resident() >= 4096
    checkpoint.let_go()
    assert resident() == 0
    assert data.sum() == want
    checkpoint.close()
