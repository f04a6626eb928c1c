"""The arithmetic of the sampling program on the device: kernels/sampling.py's, to the bit.

Every multiply and add is rounded by itself (no launch lets them fuse), divisions are `div_rn`, sums
are of integers: neither blocks nor the order of a reduction show in a result. Functions bear the
names that they have in kernels/sampling.py.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (the arguments of a kernel have Triton's types)

from __future__ import annotations

import triton
import triton.language as tl

from .. import sampling as spec

NEG_INF = tl.constexpr(float("-inf"))
INF_KEY = tl.constexpr(0x7F800000)  # ordered(inf); that of -inf is its complement
LAST_ID = tl.constexpr(spec.MAX_VOCAB - 1)
ID_BITS = tl.constexpr((spec.MAX_VOCAB - 1).bit_length())
LOWEST = tl.constexpr(-(1 << 63))  # below every packed score
ALL = tl.constexpr((1 << 54) - 1)  # beyond every place

WEIGHT_ONE = tl.constexpr(float(spec.WEIGHT_ONE))
WEIGHT_UNIT = tl.constexpr(1.0 / spec.WEIGHT_ONE)
SHARE_BITS = tl.constexpr(spec.SHARE_ONE.bit_length() - 1)
SHARE_ONE = tl.constexpr(float(spec.SHARE_ONE))
BELOW_SHARE = tl.constexpr(spec.SHARE_ONE - 1)
STREAM_GUMBEL = tl.constexpr(spec.STREAM_GUMBEL)
STREAM_XTC = tl.constexpr(spec.STREAM_XTC)
MULTIPLIER_0, MULTIPLIER_1 = (tl.constexpr(m) for m in spec.PHILOX_MULTIPLIERS)
WEYL_0, WEYL_1 = (tl.constexpr(w) for w in spec.PHILOX_WEYL)
ROUNDS = tl.constexpr(spec.PHILOX_ROUNDS)

EXP_ZERO_BELOW = tl.constexpr(float(spec.EXP_ZERO_BELOW))
LOG2_E = tl.constexpr(float(spec.LOG2_E))
LN2_HI = tl.constexpr(float(spec.LN2_HI))
LN2_LO = tl.constexpr(float(spec.LN2_LO))
SQRT_HALF_BITS = tl.constexpr(int(spec.SQRT_HALF_BITS))
E0, E1, E2, E3, E4 = (tl.constexpr(c) for c in spec.EXP_POLY)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (tl.constexpr(c) for c in spec.LOG_POLY)


# ---- order


@triton.jit
def ordered(x):
    """int32 in the order of floats, -0 and 0 equal; a NaN counts as inf."""
    x = tl.where(x != x, float("inf"), x) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def packed(score, ids):
    """int64 whose largest is the largest score, of equal ones the lowest id."""
    return (ordered(score).to(tl.int64) << 32) + (-ids + LAST_ID)


@triton.jit
def id_of(best):
    return -(best & 0xFFFFFFFF).to(tl.int32) + LAST_ID


@triton.jit
def usable(best):
    """Whether a packed score is finite."""
    key = (best >> 32).to(tl.int32)
    return (key < INF_KEY) & (key > ~INF_KEY)


@triton.jit
def place_of(score, ids):
    """int64, below 2^53, in the order (|score|, id)."""
    key = tl.abs(score).to(tl.int32, bitcast=True)
    return (key.to(tl.int64) << ID_BITS) + ids


# ---- elementary functions


@triton.jit
def rint_f32(x):
    """To the nearest even integer, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rint_i64(x):
    """The same for 0 <= x < 2^63: from 2^23 on, a float is an integer."""
    return tl.where(x < 8388608.0, (x + 8388608.0) - 8388608.0, x).to(tl.int64)


@triton.jit
def exp_f32(x):
    """x in [-inf, 0]."""
    clamped = tl.where(x > EXP_ZERO_BELOW, x, EXP_ZERO_BELOW)
    n = rint_f32(clamped * LOG2_E)
    r = (clamped - n * LN2_HI) - n * LN2_LO
    y = E3 + E4 * r
    y = y * r + E2
    y = y * r + E1
    y = y * r + E0
    y = (r * r) * y
    y = (y + r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < EXP_ZERO_BELOW, 0.0, y * power)


@triton.jit
def reduced(x):
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> 23
    return k.to(tl.float32), (bits - (k << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log_reduced(k, f):
    square = f * f
    y = L7 + L8 * f
    y = y * f + L6
    y = y * f + L5
    y = y * f + L4
    y = y * f + L3
    y = y * f + L2
    y = y * f + L1
    y = y * f + L0
    y = (f * square) * y
    y = y + k * LN2_LO
    y = y - 0.5 * square
    return (f + y) + k * LN2_HI


@triton.jit
def log_f32(x):
    k, m = reduced(x)
    return log_reduced(k, m - 1.0)


@triton.jit
def exponential_f32(u):
    k, m = reduced(1.0 - u)
    return -log_reduced(k, tl.where(u < 0.25, -u, m - 1.0))


@triton.jit
def gumbel_f32(u):
    return -log_f32(exponential_f32(u))


# ---- exact sums


@triton.jit
def weights(z):
    return rint_i64(exp_f32(z) * WEIGHT_ONE)


@triton.jit
def share(total, p):
    scaled = rint_i64(p * SHARE_ONE)
    low = (total & BELOW_SHARE) * scaled
    return (total >> SHARE_BITS) * scaled + ((low + BELOW_SHARE) >> SHARE_BITS)


@triton.jit
def log_sum(total):
    return log_f32(total.to(tl.float32) * WEIGHT_UNIT)


# ---- random numbers


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """uint32, c0 a tensor and the others scalars -> the four words of each block."""
    for i in tl.static_range(ROUNDS):
        high0, high1 = tl.umulhi(c0, MULTIPLIER_0), tl.umulhi(c2, MULTIPLIER_1)
        low0, low1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        if i < ROUNDS - 1:
            k0 += WEYL_0
            k1 += WEYL_1
    return c0, c1, c2, c3


@triton.jit
def uniform_of_word(word):
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return tl.where(u < 0.9999999403953552, u, 0.9999999403953552)  # 1 - 2^-24
