"""The sampling program's specification: every backend picks the token that this file picks.

Given identical fp32 logits [R, V], V <= MAX_VOCAB, every backend returns identical tokens, ranks
and logprob bits, and a row's result depends on that row alone (laws 2 and 5 of the design). numpy
here is notation: each line is one IEEE operation per element, and no sum's order matters.

Stages of one row
-----------------
 0. Raw checks and logprobs. A row with a NaN, a +inf or no finite logit fails: token FAILED (-1).
    Logprobs and ranks are taken here, from the logits as the program receives them (a host-side
    logits processor has run before). A row with `target` >= 0 ends here.
 1. bias: x += value (logit_bias, DRY)
 2. bans and mask: x = -inf
 3. penalties: repetition (x / r where x > 0, else x * r) over every token of prompt and output,
    then, over tokens of the output, x - frequency * count, then - presence. One rounding each.
    Nothing finite left, or +inf reached: the row fails with FAILED.
 4. greedy rows (temperature 0): argmax, ties to the lowest id; the row ends here
 5. d = x - max(x), so that d <= 0 and temperature cannot overflow upwards
 6. top-n-sigma: keep d >= -n * sigma(d)
 7. temperature: z = d / temperature (correctly rounded); z = -inf is dropped
 8. top-k        9. typical-p        10. top-p        11. min-p        12. XTC
13. argmax of z + gumbel noise over what is kept, ties to the lowest id: a draw from softmax(z)

Each filter sees only what the filters before it kept, renormalised. "Off" (SamplingInputs) skips a
stage; skipping is exactly the stage's identity. The order is what users of vLLM know: penalties,
then temperature, then the filters, so that top_p is a share of the tempered distribution (also
Hugging Face's and OpenAI's order; llama.cpp filters first and tempers last, which its users get
here at temperature 1). Among the filters it is llama.cpp's: top_n_sigma, top_k, typical_p, top_p,
min_p, xtc. top_n_sigma is taken before the division because it does not depend on temperature.

Definitions: repetition penalty CTRL (arXiv 1909.05858) as in Hugging Face transformers, presence
and frequency as in OpenAI's API, top-n-sigma arXiv 2411.07641, typical-p arXiv 2202.00666, top-p
arXiv 1904.09751, min-p arXiv 2407.01082, XTC text-generation-webui #6335 (no token is exempt, as
in llama.cpp), Gumbel-max as in arXiv 1411.0030.

Exact sums
----------
A probability is an integer: w_i = rint(exp_f32(z_i - max z) * 2^40), so 0 <= w_i <= 2^40 and a sum
over V <= 2^22 entries stays below 2^63, whatever order or tree adds it. A share p of a total S is
the integer ceil(S * rint(p * 2^24) / 2^24), in int64 (see `share`). Tokens less likely than about
2^-41 of the most likely one weigh nothing; the noise, whose range is below 26, could not choose
them either.
Where order matters it is (score, id), ascending, score >= 0: |z| for top-k and top-p, so the most
likely first and the lower id first among equals.

Random numbers
--------------
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
key = (seed mod 2^32, seed div 2^32), counter = (token id div 4, sample_index, position, stream);
token id's word is word (token id mod 4) of that block. Stream 0 is Gumbel noise, stream 1 the draw
of XTC (word of token 0). `position` is the position of the token being sampled.
A word w becomes u = min((fp32(w) + 0.5) * 2^-32, 1 - 2^-24): strictly inside (0, 1), and fine near
0, where the winners' noise -log(-log(1 - u)) comes from: a plain 23-bit u would tie 3 % of the
draws among 2^18 equal tokens and would never give a token of probability 1e-9 its due.

Arithmetic
----------
fp32, round to nearest even, each multiply and add rounded separately (no fused multiply-add), no
flushing needed: no stage relies on a subnormal. Int to fp32 conversions round to nearest even.
Largest error seen against float64: `exp_f32` 0.98 ulp of exp on [-87, 0]; `log_f32` 0.85 ulp on
normal numbers; `exponential_f32` 2.4 ulp of -log(1 - u), most of it from 1 - u near u = 0.39.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import SamplingInputs

FAILED = -1  # the token of a row that cannot be sampled
MAX_VOCAB = 1 << 22  # exact sums: MAX_VOCAB * WEIGHT_ONE < 2^63
WEIGHT_ONE = 1 << 40  # the integer weight of the most likely token
SHARE_ONE = 1 << 24  # a share of 1, see `share`
SIGMA_BITS = 20  # top-n-sigma: bits of a logit's distance from the maximum
STREAM_GUMBEL = 0
STREAM_XTC = 1

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key before every round but the first

EXP_ZERO_BELOW = np.float32(-87.0)  # exp_f32 is 0 below this: its results are 0 or normal
LOG2_E = np.float32(1.4426950408889634)
LN2_HI = np.float32(0.693359375)  # nine bits: k * LN2_HI is exact for every exponent k
LN2_LO = np.float32(-2.1219444005469057e-4)
SQRT_HALF_BITS = np.int32(0x3F3504F3)
# Weighted minimax fits, rounded to fp32; constant term first.
EXP_POLY = (  # (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2
    0.4999999403953552,
    0.1666652113199234,
    0.04166838899254799,
    0.008368710055947304,
    0.0013814610429108143,
)
LOG_POLY = (  # (log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1]
    0.3333331346511841,
    -0.25000008940696716,
    0.2000211924314499,
    -0.1666799634695053,
    0.14219550788402557,
    -0.12405591458082199,
    0.11888174712657928,
    -0.11675640940666199,
    0.06746601313352585,
)

# Draws `count` uniforms of a stream for one row: (stream, count) -> fp32 [count].
Uniforms = Callable[[int, int], np.ndarray]

_ONE = np.float32(1.0)
_HALF = np.float32(0.5)
_BELOW_ONE = np.float32(1.0 - 2.0**-24)
_NEG_INF = np.float32(-np.inf)


# ---- random numbers


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: counter [..., 4] u32, key of two u32 -> [..., 4] u32."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    m0, m1 = (np.uint64(m) for m in PHILOX_MULTIPLIERS)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & 0xFFFFFFFF, (k1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniforms(seed: int, sample_index: int, position: int, stream: int, count: int) -> np.ndarray:
    """fp32 [count] in (0, 1): element i is token id i's. kernels/cpu/counter.cpp is its twin."""
    counter = np.empty((-(-count // 4), 4), dtype=np.uint32)
    counter[:, 0] = np.arange(len(counter), dtype=np.uint32)
    counter[:, 1], counter[:, 2], counter[:, 3] = sample_index, position, stream
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:count]
    return uniform_of_word(words)


def uniform_of_word(words: np.ndarray) -> np.ndarray:
    """u32 -> fp32 strictly inside (0, 1); smallest 2^-33, largest 1 - 2^-24."""
    u = (words.astype(np.float32) + _HALF) * np.float32(2.0**-32)
    return np.asarray(np.minimum(u, _BELOW_ONE))


# ---- elementary functions


def exp_f32(x: np.ndarray) -> np.ndarray:
    """exp of fp32 x in [-inf, 0]; exactly 1 at 0, 0 below EXP_ZERO_BELOW."""
    clamped = np.maximum(x, EXP_ZERO_BELOW)
    n = np.rint(clamped * LOG2_E)
    r = (clamped - n * LN2_HI) - n * LN2_LO
    y = (r * r) * _horner(EXP_POLY, r)
    y = (y + r) + _ONE
    power = ((n.astype(np.int32) + 127) << 23).view(np.float32)  # 2^n
    return np.where(x < EXP_ZERO_BELOW, np.float32(0.0), y * power)


def log_f32(x: np.ndarray) -> np.ndarray:
    """Natural log of fp32 x, positive, finite and normal."""
    k, m = _reduce(np.asarray(x, dtype=np.float32))
    return _log_reduced(k, m - _ONE)


def exponential_f32(u: np.ndarray) -> np.ndarray:
    """-log(1 - u) for fp32 u in [2^-33, 1 - 2^-24]: an exponential variate, never 0."""
    k, m = _reduce(_ONE - u)
    f = np.where(u < np.float32(0.25), -u, m - _ONE)  # 1 - u loses the bits of a small u
    return -_log_reduced(k, f)


def gumbel_f32(u: np.ndarray) -> np.ndarray:
    """Standard Gumbel noise of u, in [-2.82, 22.88]."""
    return -log_f32(exponential_f32(u))


def _reduce(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x = m * 2^k with m in [sqrt(1/2), sqrt(2)) -> (k as fp32, m)."""
    bits = x.view(np.int32)
    k = (bits - SQRT_HALF_BITS) >> 23  # arithmetic shift
    return k.astype(np.float32), (bits - (k << 23)).view(np.float32)


def _log_reduced(k: np.ndarray, f: np.ndarray) -> np.ndarray:
    """log(2^k * (1 + f))."""
    square = f * f
    y = (f * square) * _horner(LOG_POLY, f)
    y = y + k * LN2_LO
    y = y - _HALF * square
    result: np.ndarray = (f + y) + k * LN2_HI
    return result


def _horner(poly: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    y = np.float32(poly[-2]) + np.float32(poly[-1]) * x
    for c in poly[-3::-1]:
        y = y * x + np.float32(c)
    return y


# ---- exact sums and order


def weights(z: np.ndarray) -> np.ndarray:
    """fp32 z <= 0 -> int64 rint(exp(z) * 2^40). Scaling by a power of two is exact."""
    scaled: np.ndarray = np.rint(exp_f32(z) * np.float32(WEIGHT_ONE))
    return scaled.astype(np.int64)


def share(total: int, p: np.float32) -> int:
    """ceil(total * P / 2^24) with P = rint(p * 2^24); fits int64 for total < 2^63, 0 <= p <= 1."""
    scaled = int(np.rint(p * np.float32(SHARE_ONE)))
    low = (total & (SHARE_ONE - 1)) * scaled
    return (total >> 24) * scaled + ((low + SHARE_ONE - 1) >> 24)


def log_sum(w: np.ndarray) -> np.float32:
    """log(sum(w) / 2^40): what log-sum-exp adds to the maximum."""
    total = _to_f32(w.sum()) * np.float32(1.0 / WEIGHT_ONE)
    return np.float32(log_f32(np.array([total]))[0])


def _to_f32(total: np.int64) -> np.float32:
    """One rounding; np.float32(int) would round twice, through float64."""
    return np.float32(total.astype(np.float32))


def log_softmax_row(x: np.ndarray, highest: np.float32) -> np.ndarray:
    """Logprobs [V] of a row that passed the raw checks, `highest` being its largest logit."""
    d = x - highest
    return d - log_sum(weights(d))


def keep_first(score: np.ndarray, n: int) -> np.ndarray:
    """bool: the n first in the order (score, index). n >= 1."""
    if n >= len(score):
        return np.ones(len(score), dtype=bool)
    border = np.partition(score, n - 1)[n - 1]
    keep: np.ndarray = score < border
    ties = np.flatnonzero(score == border)
    keep[ties[: n - int(np.count_nonzero(keep))]] = True
    return keep


def keep_mass(score: np.ndarray, w: np.ndarray, p: np.float32) -> np.ndarray:
    """bool: the shortest prefix, at least one, in the order (score, index) whose weight reaches
    share(sum(w), p)."""
    order = _in_order(score)
    cumulative = np.cumsum(w[order])
    needed = share(int(cumulative[-1]), p)
    keep = np.zeros(len(score), dtype=bool)
    keep[order[: int(np.searchsorted(cumulative, needed)) + 1]] = True
    return keep


def _in_order(score: np.ndarray) -> np.ndarray:
    """Indices in ascending (score, index). Bits of a float >= 0 order as the float does."""
    keys = score.view(np.int32).astype(np.int64) << 32
    keys += np.arange(len(score), dtype=np.int64)
    keys.sort()
    return keys & 0xFFFFFFFF


# ---- filters: z [n] fp32 <= 0 with maximum 0, ids ascending -> bool [n], at least one kept


def keep_top_n_sigma(d: np.ndarray, n: np.float32) -> np.ndarray:
    """d >= -n * sigma(d)."""
    return d >= -np.float32(np.float64(n) * sigma(d))


def sigma(d: np.ndarray) -> np.float64:
    """Population standard deviation of d <= 0, finite.

    d is taken in fixed point, scaled by a power of two so that its largest distance has SIGMA_BITS
    bits: sums of up to 2^22 squares are exact in int64. The last steps are one row's scalars in
    float64, each rounded once.
    """
    _, exponent = np.frexp(-d.min())  # |d| < 2^exponent
    exponent = max(int(exponent), -100)  # keeps both scales normal fp32 numbers
    q = np.rint(d * np.float32(2.0 ** (SIGMA_BITS - exponent))).astype(np.int64)
    count = np.float64(len(d))
    mean = np.float64(q.sum()) / count
    variance = np.float64((q * q).sum()) / count - mean * mean
    root = np.sqrt(np.maximum(variance, 0.0))
    return np.float64(root * np.float64(2.0 ** (exponent - SIGMA_BITS)))


def keep_typical(z: np.ndarray, p: np.float32) -> np.ndarray:
    """Tokens whose surprise is nearest to the entropy, up to mass p.

    With L = log sum exp z, the surprise is L - z_i and the entropy L + h, h = sum p_i * -z_i, so
    the score |surprise - entropy| is |z_i + h|: no logarithm. e^z * -z < 0.37, hence an exact sum.
    """
    e = exp_f32(z)
    w = np.rint(e * np.float32(WEIGHT_ONE)).astype(np.int64)
    moments = np.rint((e * -z) * np.float32(WEIGHT_ONE)).astype(np.int64)
    h = _to_f32(moments.sum()) / _to_f32(w.sum())
    return keep_mass(np.abs(z + h), w, p)


def keep_top_p(z: np.ndarray, p: np.float32) -> np.ndarray:
    return keep_mass(np.abs(z), weights(z), p)


def keep_min_p(z: np.ndarray, p: np.float32) -> np.ndarray:
    """At least p times as likely as the most likely token."""
    return exp_f32(z) >= p


def keep_xtc(z: np.ndarray, threshold: np.float32) -> np.ndarray:
    """Where two or more tokens have probability >= threshold, of these only the last in order."""
    w = weights(z)
    top = np.flatnonzero(w >= share(int(w.sum()), threshold))
    keep = np.ones(len(z), dtype=bool)
    if len(top) >= 2:
        last = top[z[top] == z[top].min()][-1]
        keep[top] = False
        keep[last] = True
    return keep


# ---- the program, one row


@dataclass(frozen=True, slots=True)
class Row:
    """One row of SamplingInputs, in the dtypes written there; the CSR parts as slices."""

    temperature: np.float32
    top_k: int
    top_p: np.float32
    min_p: np.float32
    typical_p: np.float32
    top_n_sigma: np.float32
    xtc_probability: np.float32
    xtc_threshold: np.float32
    repetition_penalty: np.float32
    presence_penalty: np.float32
    frequency_penalty: np.float32
    history_ids: np.ndarray
    history_count: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray
    ban_ids: np.ndarray
    mask: np.ndarray | None  # u32 [ceil(V / 32)]; None: everything allowed

    @classmethod
    def of(cls, rows: SamplingInputs, r: int) -> Row:
        history = slice(rows.history_start[r], rows.history_start[r + 1])
        bias = slice(rows.bias_start[r], rows.bias_start[r + 1])
        return cls(
            temperature=rows.temperature[r],
            top_k=int(rows.top_k[r]),
            top_p=rows.top_p[r],
            min_p=rows.min_p[r],
            typical_p=rows.typical_p[r],
            top_n_sigma=rows.top_n_sigma[r],
            xtc_probability=rows.xtc_probability[r],
            xtc_threshold=rows.xtc_threshold[r],
            repetition_penalty=rows.repetition_penalty[r],
            presence_penalty=rows.presence_penalty[r],
            frequency_penalty=rows.frequency_penalty[r],
            history_ids=rows.history_ids[history],
            history_count=rows.history_count[history],
            bias_ids=rows.bias_ids[bias],
            bias_values=rows.bias_values[bias],
            ban_ids=rows.ban_ids[rows.ban_start[r] : rows.ban_start[r + 1]],
            mask=rows.mask_table[rows.mask_row[r]] if rows.mask_row[r] else None,
        )


def adjust(x: np.ndarray, row: Row) -> np.ndarray:
    """Stages 1 to 3 on raw logits x [V]: x itself where nothing applies, else a changed copy."""
    penalised = len(row.history_ids) > 0 and (
        row.repetition_penalty != 1.0 or row.presence_penalty != 0 or row.frequency_penalty != 0
    )
    if not (len(row.bias_ids) or len(row.ban_ids) or row.mask is not None or penalised):
        return x
    x = x.copy()
    x[row.bias_ids] += row.bias_values
    x[row.ban_ids] = _NEG_INF
    if row.mask is not None:
        allowed = np.unpackbits(row.mask.astype("<u4").view(np.uint8), bitorder="little")
        x[allowed[: len(x)] == 0] = _NEG_INF
    if penalised:
        seen = x[row.history_ids]
        factor = row.repetition_penalty
        seen = np.where(seen > 0, seen / factor, seen * factor)
        count = row.history_count.astype(np.float32)
        seen = seen - row.frequency_penalty * count
        seen = seen - np.where(row.history_count > 0, row.presence_penalty, np.float32(0.0))
        x[row.history_ids] = seen
    return x


def choose(x: np.ndarray, row: Row, draw: Uniforms) -> int:
    """Stages 4 to 13 on adjusted logits x [V]: the token, or FAILED where none can be chosen."""
    best = int(x.argmax())  # the first of equals; a NaN counts as the largest
    highest = x[best]
    if not np.isfinite(highest):
        return FAILED
    if row.temperature == 0:
        return best
    d = x - highest
    ids = np.flatnonzero(d > _NEG_INF)
    d = d[ids]
    if row.top_n_sigma > 0:
        keep = keep_top_n_sigma(d, row.top_n_sigma)
        ids, d = ids[keep], d[keep]
    z = d / row.temperature
    keep = z > _NEG_INF
    ids, z = ids[keep], z[keep]
    if row.top_k > 0:
        keep = keep_first(np.abs(z), row.top_k)
        ids, z = ids[keep], z[keep]
    if row.typical_p < 1:
        keep = keep_typical(z, row.typical_p)
        ids, z = ids[keep], z[keep]
        z = z - z.max()  # the only filter so far that can lose the most likely token
    if row.top_p < 1:
        keep = keep_top_p(z, row.top_p)
        ids, z = ids[keep], z[keep]
    if row.min_p > 0:
        keep = keep_min_p(z, row.min_p)
        ids, z = ids[keep], z[keep]
    if row.xtc_probability > 0 and draw(STREAM_XTC, 1)[0] < row.xtc_probability:
        keep = keep_xtc(z, row.xtc_threshold)
        ids, z = ids[keep], z[keep]
    noise = gumbel_f32(draw(STREAM_GUMBEL, len(x))[ids])
    return int(ids[(z + noise).argmax()])


# ---- what every backend refuses


def check_vocab_size(vocab_size: int) -> None:
    """Errors: ValueError where the program's integer sums could overflow."""
    if not 0 < vocab_size <= MAX_VOCAB:
        raise ValueError(
            f"vocabulary of {vocab_size} tokens; the sampling program takes 1 to "
            f"{MAX_VOCAB}, beyond which its integer sums could overflow"
        )


def check_logits(x: Any, vocab_size: int) -> None:
    """Errors: ValueError unless x, of numpy or torch, is float32 [R, vocab_size]."""
    dtype = str(x.dtype).removeprefix("torch.")
    if x.ndim != 2 or x.shape[1] != vocab_size or dtype != "float32":
        raise ValueError(
            f"logits are {dtype} {list(x.shape)}; this sampler was made for float32 "
            f"[R, {vocab_size}]"
        )


def check_rows(rows: SamplingInputs, num_rows: int, vocab_size: int) -> None:
    """Errors: ValueError where the shapes of logits and rows disagree or an id or index of `rows`
    lies outside what it points into."""
    if num_rows != rows.num_rows:
        raise ValueError(
            f"{num_rows} rows of logits for sampling parameters of {rows.num_rows} rows"
        )
    words = rows.mask_table.shape[1]
    if words * 32 < vocab_size:
        raise ValueError(
            f"mask_table has {words} words a row; {vocab_size} tokens need {-(-vocab_size // 32)}"
        )
    for name in ("history", "bias", "ban"):
        start, ids = getattr(rows, f"{name}_start"), getattr(rows, f"{name}_ids")
        if start[0] < 0 or start[-1] > len(ids) or (start[1:] < start[:-1]).any():
            raise ValueError(
                f"{name}_start does not ascend within 0..{len(ids)}, its number of ids"
            )
    for name in ("history_ids", "bias_ids", "ban_ids", "target"):
        ids = getattr(rows, name)
        lowest = -1 if name == "target" else 0
        if len(ids) and (ids.min() < lowest or ids.max() >= vocab_size):
            raise ValueError(
                f"{name} spans {ids.min()}..{ids.max()}; token ids are 0..{vocab_size - 1}"
            )
    masks = rows.mask_row
    if len(masks) and (masks.min() < 0 or masks.max() >= len(rows.mask_table)):
        raise ValueError(
            f"mask_row spans {masks.min()}..{masks.max()}; mask_table has "
            f"{len(rows.mask_table)} rows"
        )
