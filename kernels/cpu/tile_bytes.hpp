// Bytes of the parts that a tile of quantised weights is made of (kernels.hpp: Elements, Scaling).
#pragma once

#include "kernels.hpp"

namespace engineroom {

constexpr int kNibbleBytes = kGroup / 2 * kTileRows;     // a group's nibbles in a tile
constexpr int kPlaneBytes = kGroup * kTileRows / 8;      // a group's bits of one plane
constexpr int kHalfBytes = 2 * kTileRows;                // one half per output
constexpr int kSuperMinBytes = 2 * kHalfBytes + 16 * kTileRows;
constexpr int kSuperSignedBytes = kHalfBytes + 16 * kTileRows;
constexpr int kFloatBytes = 4 * kTileRows;               // one float per output
constexpr int kZeroBytes = kFloatBytes + kHalfBytes;     // a scale and a zero point per output

constexpr int kE4M3Columns = 8;                          // of a step of kE4M3
constexpr int kE4M3Bytes = kE4M3Columns * kTileRows;

// Where a step of kE4M3 has column k (of 8) of output n.
constexpr int place_in_e4m3(int k, int n) {
    return n / 16 * 128 + k / 4 * 64 + n % 16 / 4 * 16 + k % 4 / 2 * 8 + n % 4 * 2 + k % 2;
}

}  // namespace engineroom
