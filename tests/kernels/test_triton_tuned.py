"""Tuned tables of the Triton linear layers: what they may hold, and that they change no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.weights import Q4_0, RawWeight
from tests.kernels.packed_steps import ROWS, one_op, plain_step, random_blocks
from tests.kernels.triton_device import TritonBackend, run, torch, triton

from engineroom.kernels.triton import cublas, device, linear, quantised, tuned  # isort: skip
from engineroom.kernels.triton.tuned import Key, Options  # isort: skip

K, N = 288, 40
KEY = Key("Q4_0", "float16", 64, 512, 16)
CUBLAS = {
    "dtype": "bfloat16",
    "rows": 40,
    "columns": 288,
    "batch_invariant": False,
    "same_bits": False,
    "faster_from": 64,
}


def a_table(**changes: Any) -> dict[str, Any]:
    return json.loads(tuned.render("a card", {KEY: Options(8, 5)}, [CUBLAS])) | changes


def a_row(**changes: Any) -> dict[str, Any]:
    return a_table()["rows"][0] | changes


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any]) -> None:
    (folder / tuned.file_name(device.card())).write_text(json.dumps(table), "utf-8")
    monkeypatch.setattr(tuned, "FOLDER", folder)


def test_a_table_is_read_as_it_was_written() -> None:
    other = KEY._replace(weight="bfloat16", x="bfloat16", tokens=128)
    rows = {KEY: Options(8, 5), other: Options(4, 2)}
    text = tuned.render("a card", rows, [CUBLAS])
    found, version = tuned.parse(text, "t")
    assert (found.rows, version) == (rows, triton.__version__)
    assert tuned.render("a card", dict(reversed(rows.items())), [CUBLAS]) == text
    assert tuned.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert tuned._MAY_BE["tokens"] == linear.TOKENS
    assert cublas.COUNTS[-1] == tuned._LIBRARY_TOKENS


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"same_bits": True, "faster_from": 1024}, False),
        ({"same_bits": False, "faster_from": 1024}, True),
        ({"same_bits": True, "faster_from": 2048}, True),
        ({"same_bits": True, "faster_from": None}, True),
    ],
)
def test_a_table_keeps_the_library_from_weights_that_it_does_not_help(
    changes: dict[str, Any], ours: bool
) -> None:
    text = json.dumps(a_table(cublas=[CUBLAS | changes]))
    found, _ = tuned.parse(text, "t")
    weight = torch.zeros(N, K, dtype=torch.bfloat16)
    assert found.is_ours(quantised.FloatMatrix(weight)) == ours
    for other in (weight.half(), weight[1:], weight[:, 1:]):
        assert not found.is_ours(quantised.FloatMatrix(other))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (a_table(schema="engineroom.tuned/0"), "schema 'engineroom.tuned/0'"),
        (a_table(rows=5), "rows is 5"),
        (a_table(more=1), r"unknown keys \['more'\]"),
        # What would decide the order of additions.
        (a_table(rows=[a_row(step=128)]), r"row 0 has unknown keys \['step'\]"),
        (a_table(rows=[a_row(num_warps=2)]), "num_warps is 2; it may be 4, 8"),
        (a_table(rows=[a_row(num_stages=True)]), "num_stages is True"),
        (a_table(rows=[a_row(columns=288)]), "columns is 288"),
        (a_table(rows=[a_row(tokens=8)]), "tokens is 8; it may be 16, 32, 64, 128"),
        (a_table(rows=[a_row(weight="Q9")]), "weight is 'Q9'"),
        (a_table(rows=[a_row(), a_row(num_warps=4)]), "row 1 is for the same launches"),
        (a_table(cublas=[{**CUBLAS, "use": True}]), r"cublas 0 has unknown keys \['use'\]"),
        (a_table(cublas=[{**CUBLAS, "same_bits": 1}]), "cublas 0: same_bits is 1"),
        ([], "lacks"),
    ],
)
def test_what_no_table_may_hold(
    table: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, table)
    with pytest.raises(ValueError, match=says):
        TritonBackend(threads=1)


def test_defaults_without_a_table_or_with_another_tritons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    assert "defaults: no table for" in TritonBackend(threads=1).describe()["tuned"]
    plant(tmp_path, monkeypatch, a_table(triton="1.0"))
    assert "is for triton 1.0" in TritonBackend(threads=1).describe()["tuned"]
    assert not tuned.load(device.card()).rows


def test_a_row_is_for_formats_that_are_held_alike() -> None:
    layouts = quantised.LAYOUTS
    codes = torch.zeros(0)
    keys = {
        name: Key.of(
            quantised.QuantisedMatrix((N, K), layouts[name], codes, codes, None, kind),
            torch.float16,
            16,
        )
        for name, kind in (("Q4_0", ""), ("INT4", ""), ("Q8_0", "int8"))
    }
    assert keys["Q4_0"] == KEY
    assert keys["INT4"].weight == "Q4_K" and keys["Q8_0"].x == "int8"


def test_a_table_changes_options_and_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    program = one_op(lambda p, s, a: ops.linear(a, p.weight("w", (N, K))), a=K)
    blocks = random_blocks(rng, Q4_0, N * K // Q4_0.block_elements)
    weights = {
        "a": rng.standard_normal((ROWS, K)).astype(np.float32),
        "w": RawWeight("w", Q4_0, (N, K), {"data": blocks.reshape(-1)}),
    }
    launched: list[tuple[int, int, int]] = []
    kernel = linear.quantised_kernel

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                launched.append(
                    tuple(options[n] for n in ("TOKENS", "num_warps", "num_stages"))  # type: ignore[arg-type]
                )
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(linear, "quantised_kernel", Recorder())

    def bits() -> list[bytes]:
        return [
            run(program, weights, plain_step(count), dtype="float16").tobytes() for count in (1, 17)
        ]

    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    before = bits()
    plant(tmp_path, monkeypatch, a_table())
    assert bits() == before
    assert launched == [(16, 4, 3), (32, 4, 3), (16, 8, 5), (32, 4, 3)]
