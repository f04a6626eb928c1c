// Packs a linear layer's matrices on all threads, each where it will be read.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "compact.hpp"
#include "dequant.hpp"
#include "linear.hpp"
#include "pack.hpp"
#include "packed_matrix.hpp"
#include "pages.hpp"

namespace engineroom {
namespace {

// A tile's rows among those of a bf16 checkpoint.
const std::uint8_t *bf16_tile(const std::uint8_t *from, const PackedWeight &layout, int tile) {
    return from + static_cast<std::size_t>(tile) * kTileRows * 2 *
                      static_cast<std::size_t>(layout.num_columns);
}

}  // namespace

std::vector<PackedMatrix> pack_layer(Pool &pool, const std::vector<RawMatrix> &matrices, bool paired,
                                     bool compact) {
    const std::size_t count = matrices.size();
    std::vector<PackedWeight> weights;
    for (const RawMatrix &m : matrices)
        weights.push_back(packed_layout(m.format, m.num_rows, m.num_columns));
    std::vector<LinearPart> parts(count);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < count; ++i) {
        parts[i].weight = &weights[i];
        bytes += packed_bytes(weights[i]);
    }
    // A pool that is not pinned has no memory of its own to touch first: fresh threads, no more than
    // are worth starting. Those of a pool, which begin at one moment, took 40% longer to fill new pages.
    constexpr std::size_t kThreadBytes = std::size_t{128} << 10;
    const bool pinned = !pool.places().empty();
    const std::size_t size = static_cast<std::size_t>(pool.size());
    const int threads = static_cast<int>(pinned ? size : std::min(size, bytes / kThreadBytes + 1));
    const auto run = [&](auto job) {
        if (pinned)
            pool.run([&](int thread) { job(thread); });
        else
            on_threads(threads, job);
    };
    const auto each_tile = [&](int thread, auto use) {  // use(matrix, tile), the thread's
        each_share(parts.data(), static_cast<int>(count), paired, thread, threads,
                   [&](int part, Tiles mine) {
                       for (int i = part; i <= part + paired; ++i)
                           for (int tile = mine.begin; tile < mine.end; ++tile)
                               use(static_cast<std::size_t>(i), tile);
                   });
    };
    std::vector<std::vector<CompactTile>> tables(count);  // of those that may become compact
    bool counts = false;
    for (std::size_t i = 0; i < count; ++i) {
        const PackedWeight &w = weights[i];
        if (!compact || w.elements != Elements::kBF16 || w.num_columns % kCompactColumns != 0) continue;
        tables[i].resize(static_cast<std::size_t>(w.num_tiles()));
        counts = true;
    }
    if (counts)
        run([&](int thread) {
            each_tile(thread, [&](std::size_t i, int tile) {
                const PackedWeight &w = weights[i];
                if (!tables[i].empty())
                    tables[i][static_cast<std::size_t>(tile)] = count_compact(
                        bf16_tile(matrices[i].from, w, tile), rows_of(w, tile), w.num_columns);
            });
        });
    std::vector<std::uint8_t *> to(count);
    std::vector<std::shared_ptr<Pages>> pages(count);
    for (std::size_t i = 0; i < count; ++i) {
        if (!tables[i].empty()) make_compact(weights[i], tables[i]);
        pages[i] = take_memory(packed_bytes(weights[i]), &to[i]);
    }
    run([&](int thread) {
        each_tile(thread, [&](std::size_t i, int tile) {
            const PackedWeight &w = weights[i];
            if (w.elements == Elements::kCompactBF16)
                pack_compact(bf16_tile(matrices[i].from, w, tile), rows_of(w, tile), w,
                             tables[i][static_cast<std::size_t>(tile)],
                             to[i] + static_cast<std::size_t>(tile) * w.tile_bytes);
            else
                pack_tiles(matrices[i].format, matrices[i].from, w, to[i], tile, tile + 1);
        });
    });
    std::vector<PackedMatrix> packed;
    for (std::size_t i = 0; i < count; ++i) {
        weights[i].data = to[i];
        packed.emplace_back(find_dequant_format(matrices[i].format)->name, weights[i], std::move(pages[i]));
    }
    return packed;
}

}  // namespace engineroom
