// Where attention reads: tiles of 16 keys or values, in the cache or gathered from it.
namespace engineroom {
namespace ER_ISA {

// One sequence's keys (or kValues: values) under one kv head, as tiles of 16 slots. Of keys a tile is
// [row / kStep][16][kStep], of values [16 / kStep][row][kStep]: kernels.hpp says which caches hold
// tiles; slots of the others are gathered.
template <class Cache, bool kValues>
struct Tiles {
    using Element = typename Cache::Element;
    using Scale = typename Cache::Scale;
    const KVCacheView &cache;
    const AttentionRows &rows;
    const Dtype dtype;
    const int row;     // elements of a slot; of a tile's, where they are keys, a multiple of kStep
    const int scales;  // of a slot
    Element *gathered;
    Scale *gathered_scales;
    const Element *tile[kSplitTiles];
    const Scale *scale[kSplitTiles];

    // `groups` of a slot: kv_groups.
    Tiles(const KVCacheView &c, const AttentionRows &r, int groups)
        : cache(c),
          rows(r),
          dtype(kValues ? c.value_dtype : c.key_dtype),
          row(kValues ? kv_row(dtype, c.head_dim)
                      : (kv_row(dtype, c.head_dim) + Cache::kStep - 1) / Cache::kStep * Cache::kStep),
          scales(Cache::kGroups ? 2 * groups : Cache::kScaled ? 1 : 0) {}

    // Where tiles are gathered: returns the end.
    std::uint8_t *take(std::uint8_t *at) {
        gathered = reinterpret_cast<Element *>(at);
        gathered_scales = reinterpret_cast<Scale *>(gathered + kSplit * row);
        return reinterpret_cast<std::uint8_t *>(gathered_scales + kSplit * scales);
    }

    bool is_tiled() const { return cache.is_tiled(dtype); }
    // Scales from a group's first of a tile to the next group's.
    std::ptrdiff_t apart() const { return is_tiled() ? cache.block_size : kTileKeys; }
    std::uint8_t *elements(std::int32_t block, int head) const {
        return kValues ? cache.values(block, head) : cache.keys(block, head);
    }
    // The tile from slot `at` of a block on, of a cache that holds tiles.
    const Element *held(std::int32_t block, int head, int at) const {
        return reinterpret_cast<const Element *>(elements(block, head)) +
               static_cast<std::ptrdiff_t>(at) * row;
    }
    // Where key i of a tile has its element e.
    int place(int i, int e) const {
        constexpr int kStep = Cache::kStep;
        return kValues ? (i / kStep * row + e) * kStep + place_in_step<Cache>(i % kStep)
                       : e / kStep * kTileKeys * kStep + i * kStep + e % kStep;
    }

    // Points `tile` and `scale` at tiles first .. end-1, of which tile 0 begins at `position`; `soon`:
    // they are not in a cache.
    void find(int first, int end, int position, bool soon) {
        position += first * kTileKeys;
        if (!is_tiled()) {
            for (int t = first; t < end; ++t, position += kTileKeys) gather(t, position);
            return;
        }
        const std::int32_t *block = rows.blocks + position / cache.block_size;
        int at = position % cache.block_size;
        for (int t = first; t < end; ++t, at += kTileKeys) {
            if (at == cache.block_size) {
                ++block;
                at = 0;
            }
            tile[t] = held(*block, rows.kv_head, at);
            if (scales == 0) continue;
            scale[t] = reinterpret_cast<const Scale *>(
                           cache.scales(elements(*block, rows.kv_head), dtype)) + at;
            for (int i = 0; soon && i < scales; ++i) prefetch(scale[t] + i * apart());
        }
    }

    void gather(int t, int position) {
        Element *to = gathered + t * kTileKeys * row;
        Scale *scale_to = gathered_scales + t * kTileKeys * scales;
        tile[t] = to;
        scale[t] = scale_to;
        const int there = kv_row(dtype, cache.head_dim);
        for (int i = 0; i < kTileKeys; ++i, ++position) {
            if (position >= rows.seq_len) {
                for (int e = 0; e < row; ++e) to[place(i, e)] = 0;
                for (int j = 0; j < scales; ++j) scale_to[j * kTileKeys + i] = 0;
                continue;
            }
            const int at = position % cache.block_size;
            std::uint8_t *block = elements(rows.blocks[position / cache.block_size], rows.kv_head);
            const Element *from = reinterpret_cast<const Element *>(block) +
                                  static_cast<std::ptrdiff_t>(at) * there;
            for (int e = 0; e < row; ++e) to[place(i, e)] = e < there ? from[e] : Element(0);
            for (int j = 0; j < scales; ++j)
                __builtin_memcpy(scale_to + j * kTileKeys + i,
                                 cache.scales(block, dtype) +
                                     sizeof(Scale) * static_cast<std::size_t>(j * cache.block_size + at),
                                 sizeof(Scale));
        }
    }
};

}  // namespace ER_ISA
}  // namespace engineroom
