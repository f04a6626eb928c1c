// Row-wise operations: norms, activations, rotation, rounding and quantisation of activations.
//
// An element's bits depend on its operands alone: what is left over at a row's end goes through the
// same vector operations as the rest, with idle lanes. Formulas: kernels/ops.py.
namespace engineroom {
namespace ER_ISA {

// ------------------------------------------------------------------------------ exp and tanh

// exp(r) - 1 for |r| <= ln(2)/2: r + r^2 q(r), q of least maximum error (3e-9 of exp(r)).
ER_INLINE F small_expm1(F r) {
    F q = f_set(0x1.6a2256p-10f);
    q = f_fma(q, r, f_set(0x1.123b02p-7f));
    q = f_fma(q, r, f_set(0x1.5558f8p-5f));
    q = f_fma(q, r, f_set(0x1.555490p-3f));
    q = f_fma(q, r, f_set(0x1.fffffcp-2f));
    return f_fma(f_mul(r, r), q, r);
}

// x - n ln(2), with ln(2) in two parts of which the first times n is exact.
ER_INLINE F less_ln2(F x, F n) {
    return f_fnma(n, f_set(-0x1.bd0106p-13f), f_fnma(n, f_set(0x1.63p-1f), x));
}

// exp(x) for x <= 88, within 2 ulp; 0 where exp(x) is below the normal range; NaN stays NaN: it is
// the second operand of f_max, which that returns.
ER_INLINE F exp_to_88(F x) {
    x = f_max(f_set(-200.0f), x);
    const F n = f_round(f_mul(x, f_set(0x1.715476p+0f)));
    return f_scale2(f_add(small_expm1(less_ln2(x, n)), f_set(1.0f)), n);
}

// 2^x for x <= 0 (and up to 127), within 5e-7 of it; 0 where it is below the normal range; NaN stays
// NaN. 2^r = 1 + r q(r) for |r| <= 1/2, q of least maximum error.
// N side by side: the latency of one is that of all.
template <int N>
ER_INLINE void exp2_to_0(F (&x)[N]) {
    constexpr float kFactors[] = {0x1.3cbea8p-7f, 0x1.c74322p-5f, 0x1.ebfa4ep-3f, 0x1.62e39ep-1f, 1.0f};
    F n[N], q[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
        x[i] = f_max(f_set(-200.0f), x[i]);
        n[i] = f_round(x[i]);
        x[i] = f_sub(x[i], n[i]);
        q[i] = f_set(0x1.23a604p-10f);
    }
#pragma GCC unroll 5
    for (const float factor : kFactors)
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) q[i] = f_fma(q[i], x[i], f_set(factor));
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) x[i] = f_scale2(q[i], n[i]);
}

// exp(x) for any x. Above 88.4 n is held at 127, where f_scale2 still has a power of two, which
// costs up to 1e-4 of precision; from 88.73 on it is infinity.
ER_INLINE F exp_any(F x) {
    x = f_min(f_set(89.0f), f_max(f_set(-200.0f), x));
    const F n = f_min(f_round(f_mul(x, f_set(0x1.715476p+0f))), f_set(127.0f));
    return f_scale2(f_add(small_expm1(less_ln2(x, n)), f_set(1.0f)), n);
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, which keeps its precision towards 0.
ER_INLINE F tanh_any(F x) {
    const F y = f_min(f_set(40.0f), f_max(f_set(-40.0f), f_add(x, x)));
    const F n = f_round(f_mul(y, f_set(0x1.715476p+0f)));
    const F power = f_scale2(f_set(1.0f), n);
    const F e = f_fma(power, small_expm1(less_ln2(y, n)), f_sub(power, f_set(1.0f)));
    return f_div(e, f_add(e, f_set(2.0f)));
}

ER_INLINE F softcap_of(F x, F cap) { return f_mul(cap, tanh_any(f_div(x, cap))); }

// ------------------------------------------------------------------------------- elementwise

// out[i] = f(x[i]) and out[i] = f(a[i], b[i]).
template <class Function>
ER_INLINE void map(const float *x, float *out, int n, Function f) {
    int i = 0;
    for (; i + 16 <= n; i += 16) f_store(out + i, f(f_load(x + i)));
    if (i < n) f_store_n(out + i, f(f_load_n(x + i, n - i)), n - i);
}
template <class Function>
ER_INLINE void map2(const float *a, const float *b, float *out, int n, Function f) {
    int i = 0;
    for (; i + 16 <= n; i += 16) f_store(out + i, f(f_load(a + i), f_load(b + i)));
    if (i < n) f_store_n(out + i, f(f_load_n(a + i, n - i), f_load_n(b + i, n - i)), n - i);
}

static void add(const float *a, const float *b, float *out, int n) {
    map2(a, b, out, n, [](F x, F y) { return f_add(x, y); });
}

static void scale(const float *x, float factor, float *out, int n) {
    const F by = f_set(factor);
    map(x, out, n, [by](F v) { return f_mul(v, by); });
}

static void softcap(const float *x, float cap, float *out, int n) {
    const F c = f_set(cap);
    map(x, out, n, [c](F v) { return softcap_of(v, c); });
}

ER_INLINE F silu_times(F g, F u) {
    return f_mul(f_div(g, f_add(exp_any(f_sub(f_zero(), g)), f_set(1.0f))), u);
}
ER_INLINE F gelu_tanh_times(F g, F u) {
    const F cube = f_mul(f_mul(g, g), g);
    const F t = f_mul(f_fma(cube, f_set(0.044715f), g), f_set(-2.0f * 0.7978845608028654f));
    return f_mul(f_div(g, f_add(exp_any(t), f_set(1.0f))), u);
}

ER_INLINE F clamped_silu_times(F g, F u) {  // f_min and f_max give the second where one is NaN
    const F gate = f_min(f_set(7.0f), g);
    const F up = f_max(f_set(-7.0f), f_min(f_set(7.0f), u));
    const F power = exp_any(f_mul(gate, f_set(-1.702f)));
    return f_mul(f_div(gate, f_add(power, f_set(1.0f))), f_add(up, f_set(1.0f)));
}
// The gate of a paired epilogue.
template <Epilogue epilogue>
ER_INLINE F gate_times(F g, F u) {
    if constexpr (epilogue == Epilogue::kSiluMul) {
        return silu_times(g, u);
    } else if constexpr (epilogue == Epilogue::kGeluMul) {
        return gelu_tanh_times(g, u);
    } else {
        static_assert(epilogue == Epilogue::kClampedSiluMul);
        return clamped_silu_times(g, u);
    }
}

static void silu_mul(const float *gate, const float *up, float *out, int n) {
    map2(gate, up, out, n, [](F g, F u) { return silu_times(g, u); });
}

static void gelu_tanh_mul(const float *gate, const float *up, float *out, int n) {
    map2(gate, up, out, n, [](F g, F u) { return gelu_tanh_times(g, u); });
}

static void clamped_silu_mul(const float *gate, const float *up, float *out, int n) {
    map2(gate, up, out, n, [](F g, F u) { return clamped_silu_times(g, u); });
}

// --------------------------------------------------------------------------------- rows

ER_INLINE float sum_of_squares(const float *x, int n) {
    F sums[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
    int i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; ++j) {
            const F v = f_load(x + i + 16 * j);
            sums[j] = f_fma(v, v, sums[j]);
        }
    for (; i < n; i += 16) {
        const F v = f_load_n(x + i, n - i < 16 ? n - i : 16);
        sums[0] = f_fma(v, v, sums[0]);
    }
    return f_sum(f_add(f_add(sums[0], sums[1]), f_add(sums[2], sums[3])));
}

// a cos - b sin and b cos + a sin, each operation rounded: no fused multiply-add, so that the
// interleaved form, written without vectors, has the same bits.
static void rope(const float *x, const float *cos, const float *sin, float *out, int heads,
                 int head_dim, int pairs, bool interleaved) {
    for (int h = 0; h < heads; ++h, x += head_dim, out += head_dim) {
        if (interleaved) {
            for (int j = 0; j < pairs; ++j) {
                const float a = x[2 * j], b = x[2 * j + 1];
                out[2 * j] = a * cos[j] - b * sin[j];
                out[2 * j + 1] = b * cos[j] + a * sin[j];
            }
        } else {
            for (int j = 0; j < pairs; j += 16) {
                const int n = pairs - j < 16 ? pairs - j : 16;
                const F a = f_load_n(x + j, n), b = f_load_n(x + pairs + j, n);
                const F c = f_load_n(cos + j, n), s = f_load_n(sin + j, n);
                f_store_n(out + j, f_sub(f_mul(a, c), f_mul(b, s)), n);
                f_store_n(out + pairs + j, f_add(f_mul(b, c), f_mul(a, s)), n);
            }
        }
        if (out != x)
            for (int j = 2 * pairs; j < head_dim; ++j) out[j] = x[j];
    }
}

template <Dtype dtype>
ER_INLINE F rounded(F x) {
    std::uint16_t halves[16];
    if (dtype == Dtype::kBF16) {
        f_store_bf16(halves, x);
        return f_load_bf16(halves);
    }
    if (dtype == Dtype::kF16) {
        f_store_f16(halves, x);
        return f_load_f16(halves);
    }
    return x;
}

// Normed rows, rounded to dtype.
template <Dtype dtype>
static void rms_norm_as(const float *x, const float *w, float *out, int n, float eps, float offset) {
    const float mean = sum_of_squares(x, n) / static_cast<float>(n);
    const F inverse = f_set(1.0f / __builtin_sqrtf(mean + eps));
    const F shift = f_set(offset);
    map2(x, w, out, n, [=](F v, F g) {
        return rounded<dtype>(f_mul(f_mul(v, inverse), f_add(g, shift)));
    });
}

static void rms_norm(const float *x, const float *w, float *out, int n, float eps, float offset,
                     Dtype dtype) {
    switch (dtype) {
        case Dtype::kBF16: rms_norm_as<Dtype::kBF16>(x, w, out, n, eps, offset); break;
        case Dtype::kF16: rms_norm_as<Dtype::kF16>(x, w, out, n, eps, offset); break;
        default: rms_norm_as<Dtype::kF32>(x, w, out, n, eps, offset);
    }
}

static void round_to(float *x, int n, Dtype dtype) {
    if (dtype == Dtype::kBF16) map(x, x, n, [](F v) { return rounded<Dtype::kBF16>(v); });
    if (dtype == Dtype::kF16) map(x, x, n, [](F v) { return rounded<Dtype::kF16>(v); });
}

// ------------------------------------------------------------------------- ends of products

ER_INLINE F load_some(const float *p, int n) { return n == 16 ? f_load(p) : f_load_n(p, n); }

constexpr int kRowsAhead = 4;  // whose results' memory is fetched: of many rows no near cache has it

template <Dtype dtype, Epilogue epilogue>
static void finish_as(const FinishedTile &t) {
    const auto load = [](const float *y, const float *scale, const float *bias, int i, int n) {
        F x = f_load(y + i);
        if (scale != nullptr) x = f_mul(x, f_load(scale + i));
        return rounded<dtype>(bias != nullptr ? f_add(x, load_some(bias + i, n)) : x);
    };
    for (std::ptrdiff_t row = 0; row < t.rows; ++row) {
        const float *y = t.y + row * kTileRows;
        float *out = t.out + row * t.out_stride;
        if (row + kRowsAhead < t.rows)
            for (int i = 0; i < t.outputs; i += 16) prefetch(out + kRowsAhead * t.out_stride + i);
        for (int i = 0; i < t.outputs; i += 16) {
            const int n = t.outputs - i < 16 ? t.outputs - i : 16;
            F x = load(y, t.scale, t.bias, i, n);
            if constexpr (epilogue == Epilogue::kAddResidual) {
                x = f_add(x, load_some(t.residual + row * t.residual_stride + i, n));
            } else if constexpr (epilogue != Epilogue::kStore) {
                const F up = load(t.up + row * kTileRows, t.up_scale, t.up_bias, i, n);
                x = gate_times<epilogue>(x, up);
            }
            if (epilogue != Epilogue::kStore) x = rounded<dtype>(x);
            if (n == 16)
                f_store(out + i, x);
            else
                f_store_n(out + i, x, n);
        }
    }
}

template <Dtype dtype>
static void finish_in(const FinishedTile &t) {
    switch (t.epilogue) {
        case Epilogue::kStore: finish_as<dtype, Epilogue::kStore>(t); break;
        case Epilogue::kAddResidual: finish_as<dtype, Epilogue::kAddResidual>(t); break;
        case Epilogue::kSiluMul: finish_as<dtype, Epilogue::kSiluMul>(t); break;
        case Epilogue::kGeluMul: finish_as<dtype, Epilogue::kGeluMul>(t); break;
        case Epilogue::kClampedSiluMul: finish_as<dtype, Epilogue::kClampedSiluMul>(t); break;
    }
}

static void finish(const FinishedTile &t) {
    switch (t.dtype) {
        case Dtype::kF32: finish_in<Dtype::kF32>(t); break;
        case Dtype::kBF16: finish_in<Dtype::kBF16>(t); break;
        case Dtype::kF16: finish_in<Dtype::kF16>(t); break;
    }
}

// --------------------------------------------------------------------- operands of products

static void to_bf16(const float *x, int n, int stride, std::uint16_t *out) {
    int i = 0;
    for (; i + 16 <= n; i += 16) f_store_bf16(out + i, f_load(x + i));
    for (; i < stride; i += 16)
        f_store_bf16(out + i, i < n ? f_load_n(x + i, n - i) : f_zero());
}

// Values of a group of 32, of which `left` are there: zeros follow them.
ER_INLINE void load_group(const float *x, int left, F &a, F &b) {
    if (left >= kGroup) {
        a = f_load(x);
        b = f_load(x + 16);
    } else {
        a = left <= 0 ? f_zero() : f_load_n(x, left < 16 ? left : 16);
        b = left <= 16 ? f_zero() : f_load_n(x + 16, left - 16);
    }
}

ER_INLINE void store_digits(std::int8_t *q, F a, F b, float inverse) {
    const F by = f_set(inverse);
    i_store_int8(q, f_mul(a, by));
    i_store_int8(q + 16, f_mul(b, by));
}

// sum[i]: of q's i-th sixteen. n: a multiple of 32.
ER_INLINE void sum_sixteens(const std::int8_t *q, int n, std::int32_t *sum) {
    const I ones = i_set_bytes(1);
    int i = 0;
    for (; i + 256 <= n; i += 256, sum += 16) {
        I fours[4];
        for (int j = 0; j < 4; ++j) fours[j] = i_dot_small(i_zero(), ones, i_load(q + i + 64 * j));
        i_store(sum, i_sum_fours(fours));
    }
    for (; i < n; i += 64) {
        std::int8_t last[64] = {};
        const bool whole = n - i >= 64;
        if (!whole) __builtin_memcpy(last, q + i, 32);
        std::int32_t fours[16];
        i_store(fours, i_dot_small(i_zero(), ones, i_load(whole ? q + i : last)));
        for (int j = 0; j < (whole ? 4 : 2); ++j)
            *sum++ = (fours[4 * j] + fours[4 * j + 1]) + (fours[4 * j + 2] + fours[4 * j + 3]);
    }
}

// Scales as they should be -> as they may be: unlike these, outside of kLeastScale to kMostScale.
ER_INLINE void raise_scales(float (&scale)[16]) {
    std::uint32_t bits[16];
    std::memcpy(bits, scale, sizeof bits);
    constexpr std::uint32_t kZeros = (1u << kScaleZeros) - 1;
    for (int j = 0; j < 16; ++j) bits[j] = (bits[j] + kZeros) & ~kZeros;
    std::memcpy(scale, bits, sizeof bits);
}

static void to_int8(const float *x, int n, int stride, const Int8Row &out) {
    const F infinity = f_set(__builtin_inff());
    const auto size = [infinity](F v) { return f_min(f_abs(v), infinity); };  // of a NaN infinity
    const int groups = stride / kGroup;
    float *const most = out.scaled_sum;  // a group's, until it has its sum
    F squares[4] = {f_zero(), f_zero(), f_zero(), f_zero()}, a, b;
    for (int g0 = 0; g0 < groups; g0 += 16) {  // the maxima and the division of sixteen groups at once
        const int some = groups - g0 < 16 ? groups - g0 : 16;
        F largest[16];
        for (int j = some; j < 16; ++j) largest[j] = f_zero();
#pragma GCC unroll 2
        for (int j = 0; j < some; ++j) {
            const int i = (g0 + j) * kGroup;
            load_group(x + i, n - i, a, b);
            squares[j % 2 * 2] = f_fma(a, a, squares[j % 2 * 2]);
            squares[j % 2 * 2 + 1] = f_fma(b, b, squares[j % 2 * 2 + 1]);
            largest[j] = f_max(size(a), size(b));
        }
        const F maxima = f_max_each(largest);
        float scale[16], inverse[16];
        f_store_n(most + g0, maxima, some);
        f_store(scale, f_mul(maxima, f_set(1.0f / 127)));
        raise_scales(scale);
        f_store(inverse, f_div(f_set(1.0f), f_load(scale)));
        f_store_n(out.scale + g0, f_load(scale), some);
        for (int j = 0; j < some; ++j) {
            const int g = g0 + j, i = g * kGroup;
            load_group(x + i, n - i, a, b);
            if (!(scale[j] >= kLeastScale && scale[j] <= kMostScale)) {
                out.scale[g] = 1.0f;
                if (most[g] > 0.0f) most[g] = __builtin_nanf("");  // which is beyond any border
                a = b = f_zero();
                inverse[j] = 0.0f;
            }
            store_digits(out.q + i, a, b, inverse[j]);
        }
    }
    const float sum = f_sum(f_add(f_add(squares[0], squares[1]), f_add(squares[2], squares[3])));
    float border = kOutlier * (sum / static_cast<float>(n));
    if (!(border < __builtin_inff())) border = __builtin_inff();
    int outliers = 0, fine = 0;
    for (int g = 0; g < groups; ++g) {
        out.fine_group[outliers] = g;
        outliers += !(most[g] * most[g] <= border);  // a branch would be mispredicted
    }
    for (int j = 0; j < outliers; ++j) {
        const int g = out.fine_group[j], i = g * kGroup;
        const F step = f_set(out.scale[g]);
        load_group(x + i, n - i, a, b);
        a = f_fnma(f_load_s8(out.q + i), step, a);
        b = f_fnma(f_load_s8(out.q + i + 16), step, b);
        const float rest = f_max_all(f_max(size(a), size(b)));
        const bool is_finite = rest < __builtin_inff();
        const float by = 127.0f / rest;
        if (!(by < __builtin_inff())) continue;  // a rest of nothing
        if (!is_finite) a = b = f_zero();
        store_digits(out.fine_q + kGroup * fine, a, b, by);
        out.fine_scale[fine] = is_finite ? rest / 127.0f : __builtin_nanf("");
        out.fine_group[fine++] = g;
    }
    *out.fine_count = fine;
    sum_sixteens(out.q, stride, out.sum16);
    sum_sixteens(out.fine_q, kGroup * fine, out.fine_sum16);
    const auto scaled = [](float scale, const std::int32_t *sums) {
        return scale * static_cast<float>(sums[0] + sums[1]);
    };
    for (int g = 0; g < groups; ++g) out.scaled_sum[g] = scaled(out.scale[g], out.sum16 + 2 * g);
    for (int j = 0; j < fine; ++j)
        out.scaled_sum[out.fine_group[j]] += scaled(out.fine_scale[j], out.fine_sum16 + 2 * j);
}

}  // namespace ER_ISA
}  // namespace engineroom
