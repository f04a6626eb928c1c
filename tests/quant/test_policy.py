"""Which weights `quantization=` makes small: those of linear layers, and never to more bits."""

from __future__ import annotations

import numpy as np
import pytest

from engineroom.kernels.weights import BF16, F32, INT4, INT8, Q4_0, Q6_K, Q8_0, Format, RawWeight
from engineroom.quant.policy import SCHEMES, NothingToQuantise, quantise


def weight(fmt: Format, rows: int = 4, columns: int = 256) -> RawWeight:
    data = np.zeros(rows * fmt.row_bytes(columns), np.uint8)
    return RawWeight("t", fmt, (rows, columns), {"data": data})


def packed(weights: dict[str, RawWeight], method: str) -> tuple[dict[str, str], str]:
    linear = [name for name in weights if name not in ("embed", "norm")]
    made = quantise(weights, linear, "head", method)
    assert list(made.weights) == list(weights)
    formats = {name: w.packed_format.name for name, w in made.weights.items()}
    return formats, "; ".join(made.notes)


def test_layers_and_head() -> None:
    weights = {"q": weight(BF16), "head": weight(F32), "embed": weight(F32), "norm": weight(F32, 1)}
    for method, scheme in SCHEMES.items():
        formats, notes = packed(weights, method)
        head = scheme.head.name if scheme.head else "F32"
        assert formats["q"] == scheme.layers.name and formats["head"] == head
        assert formats["embed"] == formats["norm"] == "F32"
        assert f"quantised on load, {method}: 1 to {scheme.layers.name}" in notes
        assert (f"1 to {head} (head)" in notes) == (scheme.head is not None)


def test_odd_rows_stay_and_are_said() -> None:
    formats, notes = packed({"q": weight(BF16), "odd": weight(BF16, 4, 100)}, "int4")
    assert formats == {"q": "INT4", "odd": "BF16"}
    assert "1 stay as they are: rows of 100 are no whole groups of 32" in notes


def test_no_weight_gets_more_bits() -> None:
    weights = {"a": weight(Q8_0), "b": weight(Q4_0), "head": weight(Q6_K)}
    formats, notes = packed(weights, "int4")
    assert formats == {"a": INT4.name, "b": "Q4_0", "head": "Q6_K"}
    assert "1 stay Q4_0, of no more bits" in notes
    assert packed({"a": weight(Q8_0)}, "int8")[0] == {"a": INT8.name}


@pytest.mark.parametrize("method,fmt", [("int8", Q4_0), ("int8", Q6_K), ("int4", Q4_0)])
def test_a_checkpoint_of_as_few_bits_is_refused(method: str, fmt: Format) -> None:
    with pytest.raises(NothingToQuantise, match=rf"'{method}'.* bits a weight.*{fmt.name} already"):
        packed({"a": weight(fmt), "head": weight(fmt)}, method)
