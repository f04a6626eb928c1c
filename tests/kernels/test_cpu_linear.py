"""Linear layers of the CPU backend: against float64, bit-equal however rows and threads are cut."""

from __future__ import annotations

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.weights import CODEBOOKS, FORMATS, RawWeight
from engineroom.quant.values import dequantise, row_dtype
from tests.counts import count

pytestmark = pytest.mark.cores

UNITS = _native.kernel_tables()
AS_BF16 = ("BF16", "FP8", "FP8_128")
FORMS = {
    name: ["f32", "bf16"] if name in AS_BF16 else ["f32"] if fmt.is_float else ["f32", "int8"]
    for name, fmt in FORMATS.items()
}
CASES = [(name, form) for name, forms in FORMS.items() for form in forms]
ROWS = [1, 2, 3, 5, 8, 13, 33, 64]

cases = pytest.mark.parametrize("name,form", CASES, ids=[f"{n}-{f}" for n, f in CASES])
units = pytest.mark.parametrize("unit", UNITS)


# ------------------------------------------------------------------------------------ material


def fields_of(name: str, data: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """Views of each field in a checkpoint's bytes, a row's header first."""
    rows = data.view(row_dtype(FORMATS[name], columns))
    blocks = rows["blocks"]
    assert rows.dtype.names and blocks.dtype.names
    fields = {field: rows[field] for field in rows.dtype.names if field != "blocks"}
    return fields | {field: blocks[field] for field in blocks.dtype.names}


def blocks(name: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """A checkpoint's bytes: random quants, scales of ordinary size and both signs."""
    fmt, rng = FORMATS[name], np.random.default_rng(seed)
    if fmt.is_float:
        values = rng.standard_normal((rows, columns), np.float32)
        if name == "F16":
            return values.astype(np.float16).reshape(-1).view(np.uint8)
        bits = values.reshape(-1).view(np.uint32)
        return bits.view(np.uint8) if name == "F32" else (bits >> 16).astype("<u2").view(np.uint8)
    data = rng.integers(0, 256, rows * fmt.row_bytes(columns), np.uint8)
    fields = fields_of(name, data, columns)
    for field, size in (("d", 1), ("m", 1), ("dmin", 1), ("zero", 8)):
        if field in fields:
            fields[field][:] = rng.uniform(-size, size, fields[field].shape)
    for field in ("scale", "absmax"):
        if field in fields and name != "INT4":
            fields[field][:] = rng.uniform(-1, 1, fields[field].shape)
    if name == "NVFP4":  # scales that are small whole numbers, but in the second of three tiles
        fields["factor"][:], fields["divisor"][:] = rng.uniform(0.5, 2, (2, rows, 1))
        whole = rng.integers(-480, 481, fields["scale"].shape) / 512
        whole[48:96] = fields["scale"][48:96]
        fields["scale"][:] = whole
    if "values" in fields:  # no NaN
        fields["values"][(fields["values"] & 0x7F) == 0x7F] = 0x80
    if "exponent" in fields:
        fields["exponent"][:] = rng.integers(117, 128, fields["exponent"].shape)
    return data


def hostile(name: str, rows: int, columns: int) -> np.ndarray:
    """Zero scales in some blocks, every quant at its end in others, scales of 60000 in a few."""
    data = blocks(name, rows, columns, 7)
    for field, values in fields_of(name, data, columns).items():
        each = values.reshape(-1, values.shape[-1])  # blocks, or headers of rows
        if field == "divisor":
            continue
        if field != "zero" and values.dtype.kind == "f":
            each[0::5] = 0
            each[3::11] = 60000
        elif field == "zero":
            each[1::5] = -8
        elif field == "exponent":
            each[0::5], each[3::11] = 0, 144
        elif field == "values":  # largest, least, zeros of both signs, subnormals
            each[1::5], each[2::5], each[3::5], each[4::5] = 0x7E, 0xFE, 0x80, 0x07
        else:
            each[1::5] = np.iinfo(values.dtype).max
            each[2::5] = np.iinfo(values.dtype).min
        values[:] = each.reshape(values.shape)  # where reshaping copied
    return data


def weight_of(name: str, data: np.ndarray, rows: int, columns: int) -> np.ndarray:
    raw = RawWeight("w", FORMATS[name], (rows, columns), {"data": data})
    return dequantise(raw).astype(np.float64)


def as_multiplied(name: str, form: str, data: np.ndarray, n: int, k: int) -> np.ndarray:
    """The weight's values as the form takes them: tables as int8 in whole steps."""
    if form != "int8" or name not in CODEBOOKS:
        return weight_of(name, data, n, k)
    fields = fields_of(name, data, k)
    values, (step, most) = (
        np.array(CODEBOOKS[name]),
        {"NF4": (123.26, 353), "FP4": (120, 319)}[name],
    )
    table = np.rint(values * step) * np.float64(np.float32(1 / step))
    assert np.abs(table - values).max() < 1 / most
    pairs = np.stack([fields["nibbles"] >> 4, fields["nibbles"] & 15], axis=-1)
    return (fields["absmax"].astype(np.float64)[..., None] * table[pairs]).reshape(n, k)


def pack(name: str, data: np.ndarray, rows: int, columns: int) -> _native.PackedMatrix:
    return _native.pack(name, data, rows, columns, 1)


def activations(rows: int, columns: int, seed: int = 3) -> np.ndarray:
    """Normal, with an outlier in some rows and a group of zeros in others."""
    x = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    x[::3, columns // 2] *= 300
    x[1::3, : min(32, columns)] = 0
    return x


def run(unit: str, weights, x: np.ndarray, form: str, **options) -> np.ndarray:
    """The (first) result; every element is overwritten, or a NaN remains to be seen."""
    return run_all(unit, weights, x, form, **options)[0]


GATES = ("silu_mul", "gelu_mul", "clamped_silu_mul")


def run_all(unit: str, weights, x: np.ndarray, form: str, **options) -> list[np.ndarray]:
    pairs = 2 if options.get("epilogue") in GATES else 1
    outs = [np.full((len(x), w.shape[0]), np.nan, np.float32) for w in weights[::pairs]]
    _native.linear_test(unit, weights, x, form, outs=outs, **options)
    return outs


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return to_bf16(x)
    return x.astype(np.float16).astype(np.float32) if dtype == "float16" else x


def int8_values(unit: str, x: np.ndarray) -> np.ndarray:
    """What the unit's int8 rows mean, exactly; test_cpu_rows.py holds them to their formula."""
    k = x.shape[1]
    out = np.empty(x.shape)
    for row, values in zip(x, out, strict=True):
        q, fine_q = np.zeros(k, np.int8), np.zeros(k, np.int8)
        scale, fine_scale, sums = (np.zeros(k // 32, np.float32) for _ in range(3))
        sum16, fine_sum16 = np.zeros(k // 16, np.int32), np.zeros(k // 16, np.int32)
        group = np.zeros(k // 32, np.int32)
        count = _native.to_int8_test(
            unit, row, q, scale, sum16, sums, group, fine_q, fine_scale, fine_sum16
        )
        values[:] = np.repeat(scale.astype(np.float64), 32) * q
        for j, g in enumerate(group[:count]):
            digits = fine_q[32 * j : 32 * j + 32].astype(np.float64)
            values[32 * g : 32 * g + 32] += np.float64(fine_scale[j]) * digits
    return out


def values_in(form: str, unit: str, x: np.ndarray) -> np.ndarray:
    """The activations that the form multiplies, as float64."""
    if form == "int8":
        return int8_values(unit, x)
    return (to_bf16(x) if form == "bf16" else x).astype(np.float64)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.view(np.uint32), np.ascontiguousarray(want).view(np.uint32))


def columns_of(name: str) -> list[int]:
    fmt = FORMATS[name]
    if fmt.is_float:
        return [1, 8, 33, 512]
    return {256: [256, 512, 2304], 128: [128, 512, 2304], 64: [64, 192, 512]}.get(
        fmt.block_elements, [32, 64, 96, 512]
    )


# ------------------------------------------------------------------------------ against float64


def assert_close(
    name: str, form: str, unit: str, data: np.ndarray, n: int, k: int, rows: list[int]
) -> None:
    """For each number of rows: a sum of K terms errs by at most K roundings of sum |w||x|.

    Roundings are as good as random, and 2^-24 sqrt(K) is the size of their random walk; four times
    that is the bound. In the int8 form minima are summed apart from the quants that they belong
    to, so there the magnitude of a weight is that of both parts.
    """
    w, x = as_multiplied(name, form, data, n, k), activations(max(rows), k)
    exact = values_in(form, unit, x)
    parts = np.abs(w)
    fields = fields_of(name, data, k)
    for field, largest in (("m", 1.0), ("dmin", 255.0 if name == "INT4" else 63.0)):
        if form == "int8" and field in fields:
            minimum = largest * np.abs(fields[field].astype(np.float64).reshape(n, -1))
            parts = parts + 2 * np.repeat(minimum, k // minimum.shape[1], axis=1)
    if form == "int8" and "zero" in fields:
        shift = np.abs(fields["d"].astype(np.float64) * fields["zero"]).reshape(n, -1)
        parts = parts + 2 * np.repeat(shift, k // shift.shape[1], axis=1)
    want, bound = exact @ w.T, 4 * 2.0**-24 * np.sqrt(k + 8) * (np.abs(exact) @ parts.T)
    matrix = pack(name, data, n, k)
    for m in rows:
        got = run(unit, [matrix], x[:m], form)
        assert np.all(np.abs(got - want[:m]) <= bound[:m])


@units
@cases
def test_against_float64(unit: str, name: str, form: str) -> None:
    for i, k in enumerate(columns_of(name)):
        for n in (1, 47, 48, 49, 100):
            m = ROWS[(i + n) % len(ROWS)]
            assert_close(name, form, unit, blocks(name, n, k, n), n, k, [m])


@units
@cases
def test_every_number_of_rows(unit: str, name: str, form: str) -> None:
    k = columns_of(name)[1]
    rows = list(range(1, 65)) if unit == UNITS[0] else ROWS
    assert_close(name, form, unit, blocks(name, 50, k, 9), 50, k, rows)


@units
@pytest.mark.parametrize("name", [n for n in FORMATS if not FORMATS[n].is_float])
def test_hostile_blocks(unit: str, name: str) -> None:
    for form in FORMS[name]:
        assert_close(name, form, unit, hostile(name, 60, 512), 60, 512, [1, 40, 70])


@units
@pytest.mark.parametrize("name", [n for n in FORMATS if "int8" in FORMS[n]])
def test_largest_int8_products(unit: str, name: str) -> None:
    """Every quant and every activation at its end: where 16-bit sums would saturate."""
    fmt = FORMATS[name]
    n, k = 48, 2 * fmt.block_elements
    for fill in (0x00, 0x80, 0x7F, 0xFF):
        data = blocks(name, n, k, 1)
        for field, values in fields_of(name, data, k).items():
            if values.dtype.kind != "f" and field not in ("scales", "exponent"):
                values[:] = (
                    np.full(1, fill, np.uint8).view(values.dtype)
                    if (values.dtype.itemsize == 1)
                    else np.full(4, fill, np.uint8).view(values.dtype)
                )
        w = as_multiplied(name, "int8", data, n, k)
        for signs in (np.ones(k), np.where(np.arange(k) % 4 < 2, 1, -1)):
            x = np.tile(signs.astype(np.float32), (9, 1))
            for rows in (x, -x):
                exact = int8_values(unit, rows)
                bound = 4 * 2.0**-24 * np.sqrt(k) * 4 * (np.abs(exact) @ np.abs(w).T + k)
                got = run(unit, [pack(name, data, n, k)], rows, "int8")
                assert np.all(np.abs(got - exact @ w.T) <= bound)


WHOLE_NUMBERS = 3 * 4 * 48  # where a tile of NVFP4 says whether its scales are such


@units
@pytest.mark.parametrize(
    "scales,are_whole",
    [
        ((1, 32752), True),
        ((-32752, 32752), True),
        ((0, 0), True),
        ((448, 2.0**-5), True),
        ((1, 65504), False),
        ((448, 2.0**-9), False),
        ((-0.0, 1), False),
        ((60000, 2.0**-24), False),
    ],
)
def test_two_scales_of_a_group_meet_as_whole_numbers_of_16_bits_or_not(
    unit: str, scales: tuple[float, float], are_whole: bool
) -> None:
    """With sums as large as they come, of either sign: nothing overflows or borrows."""
    n, k = 48, 64
    data = blocks("NVFP4", n, k, 1)
    fields = fields_of("NVFP4", data, k)
    fields["scale"][:] = scales
    fields["factor"][:], fields["divisor"][:] = 3e-3, 7
    for codes in (0x77, 0xFF, 0x7F):
        fields["nibbles"][:] = codes
        fields["nibbles"][1] = 0x7F
        matrix, w = pack("NVFP4", data, n, k), weight_of("NVFP4", data, n, k)
        assert bool(_native.tiles_of(matrix)[WHOLE_NUMBERS]) is are_whole
        for half in (1, -1):
            x = np.ones((17, k), np.float32)
            x[:, 16:32] *= half
            x[1], x[2, :16] = -1, 1e-3
            exact = int8_values(unit, x)
            bound = 4 * 2.0**-24 * np.sqrt(k) * (np.abs(exact) @ np.abs(w).T)
            got = run(unit, [matrix], x, "int8")
            assert np.all(np.abs(got - exact @ w.T) <= bound)


@units
def test_what_is_not_finite_stays_in_its_row(unit: str) -> None:
    data = blocks("Q4_0", 48, 64, 0)
    x = activations(10, 64)
    clean = run(unit, [pack("Q4_0", data, 48, 64)], x, "f32")
    x[4, 7] = np.nan
    for form in ("f32", "int8"):
        got = run(unit, [pack("Q4_0", data, 48, 64)], x, form)
        assert np.isnan(got[4]).all()
        assert np.isfinite(np.delete(got, 4, axis=0)).all()
    assert_same_bits(
        np.delete(run(unit, [pack("Q4_0", data, 48, 64)], x, "f32"), 4, axis=0),
        np.delete(clean, 4, axis=0),
    )


# ---------------------------------------------------------------------------- the pure function


@units
@cases
def test_a_row_is_the_same_in_any_company(unit: str, name: str, form: str) -> None:
    """K = 2304 is cut in blocks of K; the number of rows picks kernel and row blocks."""
    n, k = 100, 2304
    matrix = pack(name, blocks(name, n, k, 5), n, k)
    x = activations(64, k)
    want = run(unit, [matrix], x, form)
    for m in ROWS[:-1]:
        for start in (0, 64 - m):
            assert_same_bits(
                run(unit, [matrix], x[start : start + m], form), want[start : start + m]
            )
    for i in range(0, 64, 64 // count(reduced=4, full=64)):
        assert_same_bits(run(unit, [matrix], x[i : i + 1], form), want[i : i + 1])
    for threads in (2, 3):
        assert_same_bits(run(unit, [matrix], x, form, threads=threads), want)


ONE_SCALE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "INT4", "I4G32", "I8G32"]


@units
@pytest.mark.parametrize("name", [*ONE_SCALE, "I4G128", "MXFP4", "NF4", "FP4"])
def test_scales_of_any_size_give_many_rows_the_bits_of_one(unit: str, name: str) -> None:
    """Many rows multiply scales by adding their bits, where both have sizes that allow it.

    The first tile's weights are in that range, one at its end; the second's have a scale out of it
    in the last block of columns, the third's in every block. Of the rows some have groups out of
    it, or of zeros.
    """
    n, k = 144, 1536
    data = blocks(name, n, k, 3)
    fields = fields_of(name, data, k)
    field = next(f for f in ("d", "absmax", "exponent") if f in fields)
    scales = fields[field].reshape(n, -1)
    if field == "exponent":
        scales[5, -1], scales[60, -1], scales[100:] = 143, 254, 0
    else:
        scales[5, -1], scales[60, -1] = 60000, 0
        scales[100:] = np.inf if name in ("Q4_0", "Q4_K") else 1e-7
    x = activations(80, k)
    powers = {1: -140, 2: -98, 4: -84, 5: -80, 7: -20, 8: 20, 10: 60, 11: 106, 13: 107, 14: 121}
    for row, power in powers.items():
        x[row] = np.ldexp(x[row], power)
    x[16, 64:128] = 0
    x[17, 100] = np.nan
    matrix = pack(name, data, n, k)
    with np.errstate(all="ignore"):
        got = run(unit, [matrix], x, "int8")
        alone = np.concatenate([run(unit, [matrix], row[None], "int8") for row in x])
    assert np.isnan(alone[17]).all()
    assert np.isfinite(alone[18:, :48]).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(alone))
    assert_same_bits(
        np.nan_to_num(got, posinf=7, neginf=-7), np.nan_to_num(alone, posinf=7, neginf=-7)
    )


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("name,form", [("Q4_0", "int8"), ("BF16", "bf16"), ("F32", "f32")])
def test_more_rows_than_a_block(name: str, form: str, threads: int) -> None:
    """Eight threads take four shares of the rows, and split the tiles of each."""
    matrix = pack(name, blocks(name, 60, 1536, 5), 60, 1536)
    x = activations(700, 1536)
    got = run(UNITS[0], [matrix], x, form, threads=threads)
    for start in range(0, 700, 50):
        assert_same_bits(
            got[start : start + 50], run(UNITS[0], [matrix], x[start : start + 50], form)
        )


@units
@pytest.mark.parametrize("form", ["bf16", "f32"])
@pytest.mark.parametrize("exceptions", [0, 0.0005, 0.02])
def test_compact_bf16_multiplies_as_plain_bf16_does(
    unit: str, form: str, exceptions: float
) -> None:
    """Bit for bit, whatever unpacks: registers, the first rows for the others, exceptions."""
    n, k = 100, 2312  # two blocks of columns, the second of an odd number of steps
    rng = np.random.default_rng(8)
    bits = blocks("BF16", n, k, 8).view("<u2").copy()
    rare = rng.random(bits.size) < exceptions
    bits[rare] = rng.integers(0, 0x7F00, rare.sum()).astype("<u2")
    bits[rng.random(bits.size) < 0.01] = 0
    data = bits.view(np.uint8)
    compact, plain = (_native.pack("BF16", data, n, k, 1, c) for c in (True, False))
    assert compact.nbytes < 0.9 * plain.nbytes
    x = activations(64, k)
    want = run(unit, [plain], x, form)
    every = range(1, 65) if unit == UNITS[0] else ROWS
    for m in every:
        assert_same_bits(run(unit, [compact], x[:m], form), want[:m])
    assert_same_bits(run(unit, [compact, plain], x, form, threads=3), want)


@units
@pytest.mark.parametrize("form", ["bf16", "f32"])
def test_every_8_bit_float_is_multiplied_as_the_bf16_that_it_is(unit: str, form: str) -> None:
    """Bit for bit: all 254 numbers, subnormal ones and zeros too, beside the same in bf16."""
    n, k = 100, 512
    for codes in (np.arange(n * k) % 256, np.random.default_rng(3).integers(8, 120, n * k)):
        data = np.zeros(n * FORMATS["FP8"].row_bytes(k), np.uint8)
        fields = fields_of("FP8", data, k)
        fields["scale"][:] = 1
        fields["values"][:] = codes.astype(np.uint8).reshape(fields["values"].shape)
        fields["values"][(fields["values"] & 0x7F) == 0x7F] = 0
        values = weight_of("FP8", data, n, k).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype("<u2").reshape(-1)
        wide = pack("BF16", bits.view(np.uint8), n, k)
        x = activations(13, k)
        for m in (1, 3, 13):
            got = run(unit, [pack("FP8", data, n, k)], x[:m], form)
            assert_same_bits(got, run(unit, [wide], x[:m], form))


@units
def test_a_nan_among_8_bit_floats_reaches_its_output_alone(unit: str) -> None:
    data = blocks("FP8_128", 50, 256, 1)
    fields_of("FP8_128", data, 256)["values"][17, 1, 2] = 0xFF
    for form in ("bf16", "f32"):
        got = run(unit, [pack("FP8_128", data, 50, 256)], activations(9, 256), form)
        assert np.isnan(got[:, 17]).all()
        assert np.isfinite(np.delete(got, 17, axis=1)).all()


@units
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_parts_of_several_formats(unit: str, threads: int) -> None:
    """Fused parts equal each part alone, whichever thread its tiles fall to."""
    names, rows, k = ["Q6_K", "INT4", "Q4_K", "INT8"], [100, 30, 200, 1], 512
    parts = [pack(n, blocks(n, r, k, r), r, k) for n, r in zip(names, rows, strict=True)]
    x = activations(6, k)
    for got, part in zip(run_all(unit, parts, x, "int8", threads=threads), parts, strict=True):
        assert_same_bits(got, run(unit, [part], x, "int8"))


# ----------------------------------------------------------------------------------- epilogues

DTYPES = ["float32", "bfloat16", "float16"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def identity(size: int) -> _native.PackedMatrix:
    """Multiplies by one: in the f32 form what stands around the product remains, exactly."""
    return pack("F32", np.eye(size, dtype=np.float32).reshape(-1).view(np.uint8), size, size)


@units
@dtypes
@pytest.mark.parametrize("threads", [1, 2])
def test_bias_rounding_and_residual(unit: str, dtype: str, threads: int) -> None:
    n, k, m = 100, 96, 13
    matrix = pack("Q8_0", blocks("Q8_0", n, k, 2), n, k)
    x, rng = activations(m, k), np.random.default_rng(4)
    bias = rng.standard_normal(n, np.float32)
    residual = rng.standard_normal((m, n), np.float32)
    options = {"form": "int8", "dtype": dtype, "threads": threads}
    product = run(unit, [matrix], x, "int8")
    assert_same_bits(run(unit, [matrix], x, **options), rounded(product, dtype))
    y = rounded(product + bias, dtype)
    assert_same_bits(run(unit, [matrix], x, biases=[bias], **options), y)
    want = rounded(residual + y, dtype)
    options |= {"epilogue": "add_residual", "biases": [bias]}
    assert_same_bits(run(unit, [matrix], x, residual=residual, **options), want)
    inplace = residual.copy()
    _native.linear_test(unit, [matrix], x, residual=inplace, outs=[inplace], **options)
    assert_same_bits(inplace, want)


@units
@dtypes
@pytest.mark.parametrize("epilogue", GATES)
def test_gated_pairs(unit: str, dtype: str, epilogue: str) -> None:
    """Two pairs of unequal N; the gate apart is the same operation on rows already computed."""
    k, m = 64, 9
    parts = [pack("Q4_1", blocks("Q4_1", n, k, i), n, k) for i, n in enumerate((49, 49, 130, 130))]
    x = activations(m, k)
    biases = [None, np.arange(49, dtype=np.float32) / 50, None, None]
    options = {"dtype": dtype, "biases": biases}
    alone = run_all(unit, parts, x, "int8", **options)
    for threads in (1, 2, 3):
        fused = run_all(unit, parts, x, "int8", epilogue=epilogue, threads=threads, **options)
        for i in (0, 1):
            gate, up = alone[2 * i], alone[2 * i + 1]
            both, size = np.concatenate([gate, up], axis=1), gate.shape[1]
            eye = np.eye(2 * size, dtype=np.float32)
            halves = [
                pack("F32", np.ascontiguousarray(half).reshape(-1).view(np.uint8), size, 2 * size)
                for half in (eye[:size], eye[size:])
            ]
            apart = run(unit, halves, both, "f32", epilogue=epilogue, dtype=dtype)
            assert_same_bits(fused[i], apart)
            assert_same_bits(fused[i], rounded(fused[i], dtype))
            g, by = gate.astype(np.float64), up.astype(np.float64)
            u = g if epilogue == "silu_mul" else 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
            if epilogue == "clamped_silu_mul":
                g, by = np.minimum(g, 7), np.clip(by, -7, 7) + 1
                u = 1.702 * g
            with np.errstate(over="ignore"):
                want = g / (1 + np.exp(-u)) * by
            relative = {"float32": 2e-5, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
            ordinary = (np.abs(want) < 60000) & (np.abs(g) < 30)
            assert np.all(
                np.abs(fused[i] - want)[ordinary] <= relative * np.abs(want)[ordinary] + 1e-6
            )


@units
@dtypes
@pytest.mark.parametrize("form", ["f32", "int8"])
def test_norm_before_the_product(unit: str, dtype: str, form: str) -> None:
    n, k, m = 50, 96, 13
    matrix = pack("Q5_1", blocks("Q5_1", n, k, 2), n, k)
    x, weight = activations(m, k), np.random.default_rng(8).standard_normal(k, np.float32)
    norm = {"norm_weight": weight, "eps": 1e-5, "offset": 1.0, "dtype": dtype}
    h = run(unit, [identity(k)], x, "f32", **norm)
    mean = np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True)
    want = x / np.sqrt(mean + 1e-5) * (weight + 1.0)
    relative = {"float32": 2e-6, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    assert np.all(np.abs(h - want) <= relative * np.abs(want) + 1e-6)
    for threads in (1, 3):
        fused = run(unit, [matrix], x, form, threads=threads, **norm)
        assert_same_bits(fused, run(unit, [matrix], h, form, dtype=dtype))


# ------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    matrix = pack("Q8_0", blocks("Q8_0", 5, 32, 0), 5, 32)
    floats = pack("F32", blocks("F32", 5, 32, 0), 5, 32)
    x, out = np.zeros((2, 32), np.float32), np.zeros((2, 5), np.float32)

    def refused(message: str, weights=(matrix,), rows=x, outs=(out,), unit=UNITS[0], **options):
        with pytest.raises(ValueError, match=message):
            _native.linear_test(unit, list(weights), rows, outs=list(outs), **options)

    refused("this machine has no kernels named 'mmx'", unit="mmx")
    refused("unknown form 'int4'; known: f32, bf16, int8", form="int4")
    refused("unknown epilogue 'x'; known: store, add_residual", epilogue="x")
    refused("unknown dtype 'f8'", dtype="f8")
    refused("threads must be at least 1, not 0", threads=0)
    refused("at least one weight", weights=(), outs=())
    refused("1 weights has 1 results, outs has 2", outs=(out, out))
    refused("silu_mul takes weights in pairs, not 1", epilogue="silu_mul")
    refused(r"x is \[2, 31\], weight 0 is \[5, 32\]: K differs", rows=np.zeros((2, 31), np.float32))
    refused("bf16 rows do not multiply Q8_0 weights", form="bf16")
    refused("int8 rows do not multiply F32 weights", weights=(floats,), form="int8")
    codes = pack("FP8", blocks("FP8", 5, 32, 0), 5, 32)
    refused("int8 rows do not multiply FP8 weights", weights=(codes,), form="int8")
    refused(r"result 0 is \[2, 5\], outs has \[2, 4\]", outs=(np.zeros((2, 4), np.float32),))
    refused("2 biases for 1 weights", biases=[None, None])
    refused("bias 0 has 4 values for 5 outputs", biases=[np.zeros(4, np.float32)])
    refused("takes a residual and one weight", epilogue="add_residual")
    refused(
        r"the residual is \[1, 5\], the result \[2, 5\]",
        epilogue="add_residual",
        residual=np.zeros((1, 5), np.float32),
    )
    refused("the norm has 3 weights for 32 columns", norm_weight=np.zeros(3, np.float32))
    other = pack("Q8_0", blocks("Q8_0", 6, 32, 0), 6, 32)
    refused("silu_mul needs pairs of equal N", weights=(matrix, other), epilogue="silu_mul")
