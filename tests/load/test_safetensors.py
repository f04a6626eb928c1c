"""The safetensors reader and the index of shards: exact on sound files, strict on bad ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engineroom.engine.load.mapped import CheckpointError
from engineroom.engine.load.safetensors import SafetensorsFile, open_shards, read_index
from tests.counts import count
from tests.load.writers import safetensors_bytes, to_bf16, write_safetensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "b": RNG.standard_normal(7).astype(np.float16),
    "c.scalar": np.array(2.5, np.float32),
    "d.weight": RNG.standard_normal((2, 2, 4)).astype(np.float32),
}


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(TENSORS, path, {"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        weight = file.tensor(name)
        assert weight.shape == (value.shape or (1,))
        assert weight.format.name == {"float32": "F32", "float16": "F16"}[value.dtype.name]
        assert weight.data.tobytes() == value.tobytes()
        assert not weight.data.flags.writeable


def test_our_test_writer_is_read_the_same_by_the_library(tmp_path: Path) -> None:
    bf16 = ("BF16", (2, 3), to_bf16(np.arange(6, dtype=np.float32)))
    path = write_safetensors(tmp_path / "a.safetensors", TENSORS | {"e": bf16}, {"format": "pt"})
    assert_reads_as_library(path)
    weight = SafetensorsFile(path).tensor("e")
    values = (weight.data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    assert values.tolist() == [0, 1, 2, 3, 4, 5]


def assert_reads_as_library(path: Path) -> None:
    ours = SafetensorsFile(path)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert ours.tensors.keys() == theirs.keys()
    for name, t in theirs.items():
        weight = ours.tensor(name)
        assert weight.format.name == t["dtype"]
        assert weight.shape == (tuple(t["shape"]) or (1,))
        assert weight.data.tobytes() == bytes(t["data"])


GOOD = entry("F32", [2], 0, 8)
BAD: dict[str, tuple[bytes, str, str]] = {
    # id: file, field, words of the message
    "seven bytes": (bytes(7), "header length", "takes 8 bytes"),
    "header length 0": (bytes(64), "header length", "at least 2"),
    "header beyond the file": (safetensors_bytes({}, length=4096), "header length", "4096"),
    "header beyond the cap": (
        safetensors_bytes({}, length=100_000_001),
        "header length",
        "at most 100000000",
    ),
    "not an object": (safetensors_bytes(b"[1, 2, 3]"), "header", "b'['"),
    "leading space": (safetensors_bytes(b" {}"), "header", "b' '"),
    "not JSON": (safetensors_bytes(b"{1}"), "bad.safetensors: header", "Expecting"),
    "two objects": (safetensors_bytes(b"{}{}"), "bad.safetensors: header", "Extra data"),
    "not UTF-8": (safetensors_bytes(b'{"\xff":1}'), "bad.safetensors: header", "utf-8"),
    "NaN": (safetensors_bytes(b'{"a":NaN}'), "bad.safetensors: header", "NaN is not JSON"),
    "huge number": (safetensors_bytes(b'{"a":1e999}'), "bad.safetensors: header", "64-bit float"),
    "digits": (
        safetensors_bytes(b'{"a":' + b"9" * 5000 + b"}"),
        "bad.safetensors: header",
        "digits",
    ),
    "deep": (
        safetensors_bytes(b'{"a":' + b"[" * 200_000 + b"}"),
        "bad.safetensors: header",
        "nested too deeply",
    ),
    "tensor twice": (
        safetensors_bytes(b'{"a":1,"a":2}'),
        "bad.safetensors: header",
        "'a' appears twice",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__", "texts"),
    "no name": (safetensors_bytes({"": GOOD}, bytes(8)), "header", "without a name"),
    "entry not an object": (safetensors_bytes({"w": 3}), "w", "exactly dtype"),
    "entry with more": (safetensors_bytes({"w": GOOD | {"x": 1}}, bytes(8)), "w", "exactly dtype"),
    "dtype": (
        safetensors_bytes({"w": entry("F8_E4M3", [8], 0, 8)}, bytes(8)),
        "w dtype",
        "F8_E4M3",
    ),
    "dtype list": (safetensors_bytes({"w": entry(["F32"], [2], 0, 8)}), "w dtype", "supported"),
    "shape negative": (safetensors_bytes({"w": entry("F32", [-2], 0, 8)}), "w shape", "[-2]"),
    "shape bool": (safetensors_bytes({"w": entry("F32", [True], 0, 4)}), "w shape", "sizes"),
    "shape float": (safetensors_bytes({"w": entry("F32", [2.0], 0, 8)}), "w shape", "sizes"),
    "shape 0": (safetensors_bytes({"w": entry("F32", [0], 0, 0)}), "w shape", "dimension of 0"),
    "shape long": (safetensors_bytes({"w": entry("F32", [1] * 9, 0, 4)}), "w shape", "at most 8"),
    "offsets reversed": (
        safetensors_bytes({"w": entry("F32", [2], 8, 0)}, bytes(8)),
        "w data_offsets",
        "[begin, end]",
    ),
    "offsets text": (
        safetensors_bytes({"w": entry("F32", [2], "0", 8)}, bytes(8)),
        "w data_offsets",
        "[begin, end]",
    ),
    "beyond the file": (safetensors_bytes({"w": GOOD}), "w data_offsets", "ends at byte"),
    "size": (
        safetensors_bytes({"w": entry("F32", [3], 0, 8)}, bytes(8)),
        "w data_offsets",
        "takes 12 bytes, the offsets span 8",
    ),
    "overlap": (
        safetensors_bytes({"v": GOOD, "w": entry("F32", [1], 4, 8)}, bytes(8)),
        "w data_offsets",
        "an overlap",
    ),
    "gap": (
        safetensors_bytes({"v": GOOD, "w": entry("F32", [1], 12, 16)}, bytes(16)),
        "w data_offsets",
        "a gap",
    ),
    "trailing bytes": (safetensors_bytes({"w": GOOD}, bytes(9)), "data_offsets", "fetched"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused_by_field(tmp_path: Path, case: str) -> None:
    raw, field, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    assert error.value.field == field
    assert words in str(error.value) and "bad.safetensors" in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write_safetensors(tmp_path / "a.safetensors", TENSORS).read_bytes()
    path = tmp_path / "b.safetensors"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


@settings(
    max_examples=count(reduced=400, full=5_000),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    digits=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=3),
    cut=st.floats(0, 1) | st.none(),
)
@example(flips=[], digits=[], cut=None)
def test_flipped_and_cut_files_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path,
    flips: list[tuple[float, int]],
    digits: list[tuple[int, int]],
    cut: float | None,
) -> None:
    raw = bytearray(write_safetensors(tmp_path / "a.safetensors", TENSORS).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for place, value in flips:
        raw[int(place * header)] = value
    numbers = [i for i in range(8, header) if chr(raw[i]).isdigit()]
    for i, digit in digits:  # keeps the JSON well formed and changes what it claims
        if numbers:
            raw[numbers[i % len(numbers)]] = ord(str(digit))
    if cut is not None:
        raw = raw[: int(cut * len(raw))]
    path = tmp_path / "b.safetensors"
    path.write_bytes(bytes(raw))
    try:
        SafetensorsFile(path)
    except CheckpointError as error:
        assert error.field
        return
    assert_reads_as_library(path)


# ------------------------------------------------------------------------------------ shards


def write_index(folder: Path, weight_map: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m-1.safetensors", {"a.weight": TENSORS["a.weight"]})
    write_safetensors(tmp_path / "m-2.safetensors", {"b": TENSORS["b"]})
    index = read_index(
        write_index(tmp_path, {"a.weight": "m-1.safetensors", "b": "m-2.safetensors"})
    )
    shards = open_shards(tmp_path, index)
    assert {name: sorted(f.tensors) for name, f in shards.items()} == {
        "m-1.safetensors": ["a.weight"],
        "m-2.safetensors": ["b"],
    }


def test_listed_but_absent_and_present_but_unlisted_are_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a": TENSORS["a.weight"]})
    with pytest.raises(CheckpointError, match=r"lists in m\.safetensors.*does not hold them: 'b'"):
        open_shards(tmp_path, {"a": "m.safetensors", "b": "m.safetensors"})
    write_safetensors(tmp_path / "m.safetensors", {"a": TENSORS["b"], "stray": TENSORS["b"]})
    with pytest.raises(CheckpointError, match="the index does not list there: 'stray'") as error:
        open_shards(tmp_path, {"a": "m.safetensors"})
    assert error.value.field == "stray"
    with pytest.raises(CheckpointError, match=r"cannot open .*gone\.safetensors"):
        open_shards(tmp_path, {"a": "gone.safetensors"})


@pytest.mark.parametrize(
    "file",
    [
        "../m.safetensors",
        "/etc/m.safetensors",
        "sub/m.safetensors",
        "sub\\m.safetensors",
        "m.safetensors/",
        "..",
        "",
        "m.bin",
        "m\0.safetensors",
        "m" * 300 + ".safetensors",
        7,
        None,
        ["m.safetensors"],
    ],
)
def test_an_index_entry_must_be_a_bare_name(tmp_path: Path, file: Any) -> None:
    with pytest.raises(CheckpointError, match="bare name") as error:
        read_index(write_index(tmp_path, {"w": file}))
    assert error.value.field == "weight_map"


@pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
def test_an_index_must_map(tmp_path: Path, weight_map: Any) -> None:
    with pytest.raises(CheckpointError, match="must map tensors to files"):
        read_index(write_index(tmp_path, weight_map))
