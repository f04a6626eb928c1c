// Words of four rows side by side: tiles are filled four outputs at a time. Vectors of the compiler's,
// 16 bytes long, which every processor's default instructions have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace engineroom {

typedef std::uint32_t Quad __attribute__((vector_size(16)));
typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define ENGINEROOM_SHUFFLE(type, a, b, ...) ((type)__builtin_shufflevector(a, b, __VA_ARGS__))
#else
#define ENGINEROOM_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

// Four words of one row.
inline void load_words(const std::uint8_t *from, std::size_t, std::uint32_t (&w)[4]) {
    std::memcpy(w, from, sizeof w);
}

// Four words of four rows, `row_bytes` apart: w[i] is word i of each.
inline void load_words(const std::uint8_t *from, std::size_t row_bytes, Quad (&w)[4]) {
    Quad row[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&row[i], from + i * row_bytes, sizeof row[i]);
    const Quad low01 = ENGINEROOM_SHUFFLE(Quad, row[0], row[1], 0, 4, 1, 5);
    const Quad high01 = ENGINEROOM_SHUFFLE(Quad, row[0], row[1], 2, 6, 3, 7);
    const Quad low23 = ENGINEROOM_SHUFFLE(Quad, row[2], row[3], 0, 4, 1, 5);
    const Quad high23 = ENGINEROOM_SHUFFLE(Quad, row[2], row[3], 2, 6, 3, 7);
    w[0] = ENGINEROOM_SHUFFLE(Quad, low01, low23, 0, 1, 4, 5);
    w[1] = ENGINEROOM_SHUFFLE(Quad, low01, low23, 2, 3, 6, 7);
    w[2] = ENGINEROOM_SHUFFLE(Quad, high01, high23, 0, 1, 4, 5);
    w[3] = ENGINEROOM_SHUFFLE(Quad, high01, high23, 2, 3, 6, 7);
}

// The bytes at even places of two vectors.
inline Bytes16 even_bytes(Quad a, Quad b) {
    return ENGINEROOM_SHUFFLE(Bytes16, (Bytes16)a, (Bytes16)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20,
                              22, 24, 26, 28, 30);
}

inline Bytes16 all_of(int byte) {
    Bytes16 bytes;
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<std::uint8_t>(byte);
    return bytes;
}

template <class Words>
void store_words(std::uint8_t *to, Words words) {
    std::memcpy(to, &words, sizeof words);
}

// Calls each(n, word) for rows 0 to `rows` - 1: with a Quad for four of them at a time, then with a
// std::uint32_t for one.
template <class Each>
void by_rows(int rows, Each each) {
    int n = 0;
    for (; n + 4 <= rows; n += 4) each(n, Quad{});
    for (; n < rows; ++n) each(n, std::uint32_t{});
}

}  // namespace engineroom
