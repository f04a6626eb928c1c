"""Test vectors of the sampling program: plain data that every backend's tests read.

fp32 values stand as their bits. A backend that reproduces all of them agrees with
kernels/sampling.py on its arithmetic; larger comparisons then belong against that file itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# counter, key, output. The published answers: Random123, tests/kat_vectors, "philox4x32 10".
PHILOX: tuple[tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]], ...] = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# (seed, sample_index, position, stream, token id) -> bits of its uniform.
UNIFORM: tuple[tuple[int, int, int, int, int, int], ...] = (
    (0, 0, 0, 0, 0, 0x3ECC4FD2),
    (0, 0, 0, 0, 3, 0x3F1B00DC),
    (0, 0, 0, 0, 4, 0x3F78E4CD),
    (1, 0, 0, 0, 5, 0x3F5FC5CD),
    (4294967296, 0, 0, 0, 5, 0x3EC60DE8),
    (18446744073709551615, 0, 0, 0, 49151, 0x3EC1576E),
    (12345, 1, 0, 0, 7, 0x3EF4280E),
    (12345, 0, 1, 0, 7, 0x3F332C04),
    (12345, 0, 0, 1, 7, 0x3E6D2157),
    (12345, 127, 16777216, 1, 0, 0x3CC772E6),
    (16045690984503111693, 3, 4095, 0, 262143, 0x3D952AD5),
)

# Philox word -> bits of its uniform.
UNIFORM_OF_WORD: tuple[tuple[int, int], ...] = (
    (0x00000000, 0x2F000000),
    (0x00000001, 0x2FC00000),
    (0x00000002, 0x30200000),
    (0x00FFFFFF, 0x3B800000),
    (0x01000001, 0x3B800000),
    (0x12345678, 0x3D91A2B4),
    (0x7FFFFFFF, 0x3F000000),
    (0x80000000, 0x3F000000),
    (0xFFFFFE00, 0x3F7FFFFE),
    (0xFFFFFF7F, 0x3F7FFFFF),
    (0xFFFFFF80, 0x3F7FFFFF),
    (0xFFFFFFFF, 0x3F7FFFFF),
)

# exp_f32: bits of x, bits of the result.
EXP: tuple[tuple[int, int], ...] = (
    (0x00000000, 0x3F800000),  # 0
    (0x80000000, 0x3F800000),  # -0
    (0xAEDBE6FF, 0x3F800000),  # -1.00000001e-10
    (0xBDCCCCCD, 0x3F67A36D),  # -0.100000001
    (0xBEB17218, 0x3F3504F3),  # -0.346573591
    (0xBEB17219, 0x3F3504F3),  # -0.346573621
    (0xBF000000, 0x3F1B4598),  # -0.5
    (0xBF800000, 0x3EBC5AB2),  # -1
    (0xC0490FDB, 0x3D310113),  # -3.14159274
    (0xC1E00000, 0x2B429F81),  # -28
    (0xC1E40000, 0x2AEC16F7),  # -28.5
    (0xC2490000, 0x1B35981C),  # -50.25
    (0xC2ADCCCD, 0x00C60F89),  # -86.9000015
    (0xC2AE0000, 0x00B33687),  # -87
    (0xC2AE0001, 0x00000000),  # -87.0000076
    (0xF149F2CA, 0x00000000),  # -1.00000002e+30
    (0xFF800000, 0x00000000),  # -inf
    (0xC1C13361, 0x2E0EE48A),  # -24.1500874
    (0xC1C1E7E2, 0x2E02D673),  # -24.238224
    (0xC1775B34, 0x344F6663),  # -15.4597664
    (0xC1092F46, 0x39462035),  # -8.57404137
    (0xBFCF180A, 0x3E4B11EB),  # -1.61792111
    (0xC138045E, 0x3729C60E),  # -11.5010662
    (0xC1441130, 0x369FE3BA),  # -12.2541962
    (0xBFADDB54, 0x3E83A3C4),  # -1.35825586
    (0xBFBB3AC8, 0x3E6D294A),  # -1.46273136
    (0xC1EFCD61, 0x29D7FCF7),  # -29.9752827
    (0xC19C918F, 0x31598174),  # -19.5710735
    (0xC0E1213A, 0x3A66C07F),  # -7.03530598
    (0xC150C65B, 0x36108476),  # -13.0484266
    (0xC1E9CE00, 0x2A648DDC),  # -29.2255859
    (0xC1D77150, 0x2C0DCDAF),  # -26.9303284
)

# log_f32: bits of x, bits of the result.
LOG: tuple[tuple[int, int], ...] = (
    (0x3F800000, 0x00000000),  # 1
    (0x3F3504F3, 0xBEB17218),  # 0.707106769
    (0x3F3504F4, 0xBEB17216),  # 0.707106829
    (0x3F7FFFFF, 0xB3800000),  # 0.99999994
    (0x3F800001, 0x33FFFFFF),  # 1.00000012
    (0x3FB504F3, 0x3EB17217),  # 1.41421354
    (0x3FB504F4, 0x3EB1721A),  # 1.41421366
    (0x40000000, 0x3F317218),  # 2
    (0x3F000000, 0xBF317218),  # 0.5
    (0x2F000000, 0xC1B6FDA9),  # 1.16415322e-10
    (0x4A800000, 0x4173FCE1),  # 4194304
    (0x41851592, 0x4033F049),  # 16.6355324
    (0x402DF854, 0x3F800000),  # 2.71828175
    (0x41200000, 0x40135D8E),  # 10
    (0x3727C5AC, 0xC13834F1),  # 9.99999975e-06
    (0x465B0760, 0x4118C4F6),  # 14017.8438
    (0x3AF90D8B, 0xC0C881BC),  # 0.00190012285
    (0x3D83AFC3, 0xC02FA0E1),  # 0.0643000826
    (0x421F3DD0, 0x406BC8BE),  # 39.8103638
    (0x3294B400, 0xC18EF9A9),  # 1.73113222e-08
    (0x3F1316EC, 0xBF0DDBDA),  # 0.57456851
    (0x37E72DC4, 0xC127FCB3),  # 2.75586572e-05
    (0x473D29F3, 0x412C9ACB),  # 48425.9492
    (0x32A79040, 0xC18E051C),  # 1.95069561e-08
    (0x422DC15C, 0x40715DDC),  # 43.4388275
    (0x47075B8B, 0x41273FE3),  # 34651.543
    (0x36C551FA, 0xC140B39E),  # 5.88060084e-06
    (0x47A468FB, 0x41357376),  # 84177.9609
    (0x4711B776, 0x41286DF1),  # 37303.4609
    (0x3187671D, 0xC19AD0B0),  # 3.94073973e-09
)

# exponential_f32: bits of x, bits of the result.
EXPONENTIAL: tuple[tuple[int, int], ...] = (
    (0x2F000000, 0x2F000000),  # 1.16415322e-10
    (0x2FC00000, 0x2FC00000),  # 3.49245965e-10
    (0x358637BD, 0x358637C1),  # 9.99999997e-07
    (0x3DCCCCCD, 0x3DD7C741),  # 0.100000001
    (0x3E7FFFFF, 0x3E934B10),  # 0.249999985
    (0x3E800000, 0x3E934B10),  # 0.25
    (0x3E95F61A, 0x3EB17218),  # 0.292893231
    (0x3EC88D9D, 0x3EFE835C),  # 0.391705424
    (0x3F000000, 0x3F317218),  # 0.5
    (0x3F400000, 0x3FB17218),  # 0.75
    (0x3F7D70A4, 0x40935D90),  # 0.99000001
    (0x3F7FFFFE, 0x417F1402),  # 0.999999881
    (0x3F7FFFFF, 0x41851592),  # 0.99999994
    (0x3F47345E, 0x3FC0BB7A),  # 0.77814281
    (0x3F351E6E, 0x3F9D58E6),  # 0.70749557
    (0x3F455EC3, 0x3FBCA9DC),  # 0.770977199
    (0x3A9D3EB3, 0x3A9D56DD),  # 0.00119968352
    (0x3D1B12F7, 0x3D1E15FD),  # 0.0378598832
    (0x3F00DC76, 0x3F332C81),  # 0.503363967
    (0x3EAB995A, 0x3ED0FFA4),  # 0.335154355
    (0x3EDF92D3, 0x3F12EA18),  # 0.436667055
    (0x3F6E69EC, 0x402B6558),  # 0.93130374
    (0x3E502183, 0x3E68ABCE),  # 0.203252837
    (0x3F0729B5, 0x3F40301E),  # 0.527980149
    (0x3EA65EE2, 0x3EC931BE),  # 0.324942648
)

# gumbel_f32: bits of x, bits of the result.
GUMBEL: tuple[tuple[int, int], ...] = (
    (0x2F000000, 0x41B6FDA9),  # 1.16415322e-10
    (0x2FC00000, 0x41AE33B3),  # 3.49245965e-10
    (0x358637BD, 0x415D0C54),  # 9.99999997e-07
    (0x3DCCCCCD, 0x40100605),  # 0.100000001
    (0x3E7FFFFF, 0x3F9F79A2),  # 0.249999985
    (0x3E800000, 0x3F9F79A2),  # 0.25
    (0x3E95F61A, 0x3F87A2F1),  # 0.292893231
    (0x3EC88D9D, 0x3F32EFD8),  # 0.391705424
    (0x3F000000, 0x3EBBA795),  # 0.5
    (0x3F400000, 0xBEA73C9B),  # 0.75
    (0x3F7D70A4, 0xBFC37AA1),  # 0.99000001
    (0x3F7FFFFE, 0xC03136FD),  # 0.999999881
    (0x3F7FFFFF, 0xC033F049),  # 0.99999994
    (0x3F47345E, 0xBED18C1C),  # 0.77814281
    (0x3F351E6E, 0xBE53610F),  # 0.70749557
    (0x3F455EC3, 0xBEC69F64),  # 0.770977199
    (0x3A9D3EB3, 0x40D733FF),  # 0.00119968352
    (0x3D1B12F7, 0x40504BD2),  # 0.0378598832
    (0x3F00DC76, 0x3EB6B13B),  # 0.503363967
    (0x3EAB995A, 0x3F656011),  # 0.335154355
    (0x3EDF92D3, 0x3F0E29EC),  # 0.436667055
    (0x3F6E69EC, 0xBF7C2F0C),  # 0.93130374
    (0x3E502183, 0x3FBDAD20),  # 0.203252837
    (0x3F0729B5, 0x3E92CAD1),  # 0.527980149
    (0x3EA65EE2, 0x3F6F1E21),  # 0.324942648
)


class RowVector(NamedTuple):
    """One row: logits(vocab, salt, bits) with `row`'s parameters gives `token`.

    `row`: names of SamplingInputs, absent ones off; the sparse parts are history {token: count in
    the output}, bias {token: value}, ban and allowed (token ids). logprob and rank are the token's.
    """

    vocab: int
    salt: int
    bits: int
    row: Mapping[str, Any]
    token: int
    logprob: int  # bits
    rank: int


def logits(vocab: int, salt: int, bits: int) -> np.ndarray:
    """fp32 [vocab] in [-8, 8), exact multiples of 2^(4 - bits): few bits give many ties."""
    word = np.arange(vocab, dtype=np.uint64) * np.uint64(2654435761)
    word = (word + np.uint64(salt) * np.uint64(40503)) & np.uint64(0xFFFFFFFF)
    top = (word >> np.uint64(32 - bits)).astype(np.float32)
    return top * np.float32(2.0 ** (4 - bits)) - np.float32(8.0)


ROWS: tuple[RowVector, ...] = (
    RowVector(1, 0, 24, {"seed": 9}, 0, 0x00000000, 1),
    RowVector(8, 1, 24, {"seed": 1}, 3, 0xBDEC34FF, 1),
    RowVector(100, 2, 24, {"temperature": 0.0}, 55, 0xBFF2CFA7, 1),
    RowVector(4096, 3, 5, {"temperature": 0.0}, 21, 0xC0B92704, 1),
    RowVector(4096, 3, 5, {"temperature": 0.0, "ban": [0, 1, 2, 3]}, 21, 0xC0B92704, 1),
    RowVector(4096, 4, 24, {"seed": 2**64 - 1, "position": 7}, 1851, 0xC0BB3F6C, 79),
    RowVector(4096, 4, 24, {"seed": 2**64 - 1, "position": 8}, 3948, 0xC0B267C6, 8),
    RowVector(
        4096, 4, 24, {"seed": 2**64 - 1, "position": 7, "sample_index": 1}, 3338, 0xC0B2C7B6, 11
    ),
    RowVector(
        4096, 18, 24, {"seed": 57, "temperature": 0.25, "sample_index": 127}, 2660, 0xC0C0A04A, 122
    ),
    RowVector(
        49152,
        5,
        24,
        {"seed": 42, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
        10336,
        0xC100A7B6,
        34,
    ),
    RowVector(
        49152, 6, 24, {"seed": 43, "temperature": 1.5, "min_p": 0.05}, 9090, 0xC112AA02, 3491
    ),
    RowVector(4096, 7, 6, {"seed": 44, "top_k": 7}, 199, 0xC0B56786, 1),
    RowVector(4096, 8, 6, {"seed": 45, "top_p": 0.5}, 2406, 0xC0B56B91, 1),
    RowVector(4096, 8, 6, {"seed": 45, "top_p": 0.0}, 55, 0xC0B56B91, 1),
    RowVector(4096, 9, 24, {"seed": 46, "typical_p": 0.3}, 1262, 0xC0C68564, 169),
    RowVector(4096, 9, 6, {"seed": 47, "typical_p": 0.9, "top_p": 0.9}, 2927, 0xC0B5741D, 1),
    RowVector(4096, 10, 24, {"seed": 48, "top_n_sigma": 1.0}, 987, 0xC0B1B4D6, 2),
    RowVector(
        64, 11, 24, {"seed": 49, "xtc_probability": 1.0, "xtc_threshold": 0.02}, 58, 0xC0783F68, 11
    ),
    RowVector(
        64, 11, 4, {"seed": 50, "xtc_probability": 0.5, "xtc_threshold": 0.01}, 11, 0xC09B09E0, 13
    ),
    RowVector(
        64,
        12,
        24,
        {
            "seed": 51,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.25,
            "history": {i: i % 3 for i in range(0, 64, 2)},
        },
        21,
        0xBFE0A385,
        2,
    ),
    RowVector(
        64,
        12,
        24,
        {
            "temperature": 0.0,
            "repetition_penalty": 1.7,
            "history": {i: 1 for i in range(64) if i % 5},
        },
        55,
        0xBFC5B23D,
        1,
    ),
    RowVector(
        64,
        13,
        24,
        {
            "seed": 52,
            "bias": {3: 6.5, 9: -100.0, 40: 0.125},
            "ban": [1, 2],
            "allowed": [1, 3, 9, 33, 40, 63],
        },
        3,
        0xC06FEBFE,
        10,
    ),
    RowVector(
        49152,
        14,
        24,
        {
            "seed": 53,
            "temperature": 0.7,
            "top_k": 200,
            "typical_p": 0.95,
            "top_p": 0.9,
            "min_p": 0.01,
            "xtc_probability": 0.9,
            "xtc_threshold": 0.05,
            "repetition_penalty": 1.1,
            "history": {i: i % 4 for i in range(0, 49152, 997)},
            "top_n_sigma": 2.0,
        },
        377,
        0xC100C176,
        53,
    ),
    RowVector(
        262144, 15, 24, {"seed": 54, "position": 131071, "top_p": 0.99}, 29592, 0xC13E9FE9, 36208
    ),
    RowVector(4096, 16, 24, {"seed": 55, "temperature": 100.0}, 4044, 0xC1823320, 2747),
    RowVector(4096, 16, 24, {"seed": 55, "temperature": 1e-5}, 2584, 0xC0B1908B, 1),
    RowVector(64, 17, 24, {"seed": 56, "ban": list(range(64))}, -1, 0x7FC00000, 0),
)
