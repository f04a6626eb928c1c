// Float products: how the weights of a step are multiplied, and the loops over rows and columns.
//
// A Step has kColumns columns of kStepBytes bytes; add(f, w, x, ...) adds to f [R][kVectors] the
// products of rows x, `stride` elements apart. Up to kUnaidedRows rows the processor fetches a
// straight stream by itself, and our prefetches only take its slots; with more rows its view ahead is
// too short for the arithmetic (measured).
namespace engineroom {
namespace ER_ISA {

struct StepBF16 {  // pairs of bf16 with pairs of bf16
    using X = std::uint16_t;
    static constexpr int kColumns = 2;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 8;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        P p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = p_load(halves(w) + 32 * (v0 + v));
        add_pairs<R>(f, p, x, stride);
    }
    template <int R>
    ER_INLINE void add_pairs(F (&f)[R][kVectors], const P (&w)[kVectors], const X *x,
                             std::ptrdiff_t stride) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const P pair = p_bcast(x + r * stride);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) f[r][v] = p_dot(f[r][v], w[v], pair);
        }
    }
};

template <int R>
ER_INLINE void add_column(F (&f)[R][kVectors], const F (&w)[kVectors], const float *x,
                          std::ptrdiff_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const F one = f_set(x[r * stride]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) f[r][v] = f_fma(w[v], one, f[r][v]);
    }
}

struct StepF32 {
    using X = float;
    static constexpr int kColumns = 1;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 8;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        F p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
            p[v] = f_load(reinterpret_cast<const float *>(w) + 16 * (v0 + v));
        add_column<R>(f, p, x, stride);
    }
};

struct StepF16 {
    using X = float;
    static constexpr int kColumns = 1;
    static constexpr int kStepBytes = 2 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 4;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        F p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = f_load_f16(halves(w) + 16 * (v0 + v));
        add_column<R>(f, p, x, stride);
    }
};

struct StepWideBF16 {  // bf16 weights, fp32 activations
    using X = float;
    static constexpr int kColumns = 2;
    static constexpr int kStepBytes = 4 * kTileRows;
    static constexpr int kDistance = kAhead;
    static constexpr int kUnaidedRows = 4;
    template <int R>
    ER_INLINE void add(F (&f)[R][kVectors], const std::uint8_t *w, int v0, const X *x,
                       std::ptrdiff_t stride) {
        P p[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) p[v] = p_load(halves(w) + 32 * (v0 + v));
        add_pairs<R>(f, p, x, stride);
    }
    template <int R>
    ER_INLINE void add_pairs(F (&f)[R][kVectors], const P (&w)[kVectors], const X *x,
                             std::ptrdiff_t stride) {
        F column[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) column[v] = f_even(w[v]);
        add_column<R>(f, column, x, stride);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) column[v] = f_odd(w[v]);
        add_column<R>(f, column, x + 1, stride);
    }
};

// out [R][48] from `steps` steps. Weights that come from memory are fetched ahead, but not where
// kUnaidedRows says so and one pass reads all of a tile; for later rows of the same weights `fetch`
// says what is fetched instead.
template <class Step, int R, bool kFromMemory>
static __attribute__((noinline)) void float_rows(const Step &start, const std::uint8_t *w,
                                                 int steps, const typename Step::X *x,
                                                 std::ptrdiff_t stride, bool first, float *out,
                                                 Fetch fetch) {
    for (int v0 = 0; v0 < kTileVectors; v0 += kVectors) {
        F f[R][kVectors];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f[r][v] = first ? f_zero() : f_load(out + r * kTileRows + 16 * (v0 + v));
        Step step = start;
        const std::uint8_t *at = w;
        const typename Step::X *column = x;
        for (int s = 0; s < steps; ++s, at += Step::kStepBytes, column += Step::kColumns) {
            if (v0 == 0) {
                if constexpr (!kFromMemory)
                    fetch_step(fetch);
                else if constexpr (R > Step::kUnaidedRows || kVectors < kTileVectors)
#pragma GCC unroll 9
                    for (int i = 0; i < (Step::kStepBytes + 63) / 64; ++i)
                        prefetch_far(at + Step::kDistance + 64 * i);
            }
            step.template add<R>(f, at, v0, column, stride);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v)
                f_store(out + r * kTileRows + 16 * (v0 + v), f[r][v]);
    }
}

template <class Step, int R>
ER_INLINE void float_some(const Step &step, int rows, bool ahead, const std::uint8_t *w, int steps,
                          const typename Step::X *x, std::ptrdiff_t stride, bool first, float *out,
                          const Fetch &fetch) {
    if (R == 1 || rows == R) {
        if (ahead)
            float_rows<Step, R, true>(step, w, steps, x, stride, first, out, fetch);
        else
            float_rows<Step, R, false>(step, w, steps, x, stride, first, out, fetch);
    } else if constexpr (R > 1) {
        float_some<Step, R - 1>(step, rows, ahead, w, steps, x, stride, first, out, fetch);
    }
}

// All rows: x has row 0 at the first of `columns` columns. `ahead`: whether w comes from memory;
// then the first rows fetch it, and the later ones `fetch`. Else all rows do. Its lines: in all.
template <class Step, int kRows>
static void float_blocks(const Step &step, const std::uint8_t *w, int columns,
                         const typename Step::X *x, std::ptrdiff_t stride, int rows, bool ahead,
                         bool first, float *out, Fetch fetch) {
    const int steps = (columns + Step::kColumns - 1) / Step::kColumns;
    const int blocks = (rows + kRows - 1) / kRows;
    const int fetching = (ahead ? blocks - 1 : blocks) * steps;
    if (fetching > 0) fetch.lines = (fetch.lines + fetching - 1) / fetching;
    int begin = 0;
    for (int block = 0; block < blocks; ++block) {
        const int end = static_cast<int>(static_cast<std::int64_t>(rows) * (block + 1) / blocks);
        const bool from_memory = ahead && block == 0;
        float_some<Step, kRows>(step, end - begin, from_memory, w, steps, x + begin * stride, stride,
                                first, out + begin * kTileRows, fetch);
        if (!from_memory) fetch.next += static_cast<std::ptrdiff_t>(64) * fetch.lines * steps;
        begin = end;
    }
}

template <class Step, int kRows>
static void float_tile(const Step &step, const PackedWeight &w, int tile, int k0, int k1,
                       const typename Step::X *x, std::ptrdiff_t stride, int row0, int rows,
                       bool first, float *out) {
    const std::uint8_t *from = w.data + tile * w.tile_bytes + w.scales_bytes;
    from += static_cast<std::ptrdiff_t>(k0 / Step::kColumns) * Step::kStepBytes;
    const int steps = (k1 - k0 + Step::kColumns - 1) / Step::kColumns;
    const std::ptrdiff_t bytes = static_cast<std::ptrdiff_t>(steps) * Step::kStepBytes;
    float_blocks<Step, kRows>(step, from, k1 - k0, x + row0 * stride + k0, stride, rows, true, first,
                              out, Fetch{from + bytes, static_cast<int>(bytes / 64)});
}

// Up to kFirst rows unpack in registers. Of more, the first do so too and leave what they unpacked to
// the others. head: what Step needs of the tile besides its elements.
template <template <class, bool> class Step, class Plain, int kFirst, int kRows>
static void unpacked_tile(const PackedWeight &w, const std::uint8_t *head, int tile, int k0, int k1,
                          const typename Plain::X *x, std::ptrdiff_t stride, int row0, int rows,
                          bool first, float *out, std::uint8_t *scratch) {
    using Keeping = Step<Plain, true>;
    if (rows <= kFirst) {
        float_tile<Step<Plain, false>, kFirst>({head, k0, scratch}, w, tile, k0, k1, x, stride, row0,
                                               rows, first, out);
        return;
    }
    const int some = rows / ((rows + kFirst - 1) / kFirst);
    float_tile<Keeping, kFirst>({head, k0, scratch}, w, tile, k0, k1, x, stride, row0, some, first,
                                out);
    const int bytes = (k1 - k0) / Keeping::kColumns * Keeping::kStepBytes;
    const std::uint8_t *next = w.data + tile * w.tile_bytes + w.scales_bytes +
                               k1 / Keeping::kColumns * Keeping::kStepBytes;
    float_blocks<Plain, kRows>(Plain{}, scratch, k1 - k0, x + (row0 + some) * stride + k0, stride,
                               rows - some, false, first, out + some * kTileRows,
                               Fetch{next, bytes / 64});
}

}  // namespace ER_ISA
}  // namespace engineroom
