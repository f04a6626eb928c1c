// What rows see of a split of keys, and the blocks of them that are multiplied together.
namespace engineroom {
namespace ER_ISA {

// Keys from .. to-1 of a split, counted from its first; none where to <= from.
struct Span {
    int from, to;
    bool empty() const { return to <= from; }
    // What either sees.
    Span with(Span other) const {
        if (empty()) return other;
        if (other.empty()) return *this;
        return {from < other.from ? from : other.from, to > other.to ? to : other.to};
    }
    int first_tile() const { return from / kTileKeys; }
    int end_tile() const { return (to + kTileKeys - 1) / kTileKeys; }
};

static Span visible(const AttentionRows &rows, int token, int split) {
    const int position = rows.positions[token];
    int last = position < rows.seq_len ? position : rows.seq_len - 1;
    int from = rows.window > 0 && position >= rows.window ? position - rows.window + 1 : 0;
    from -= split * kSplit;
    last -= split * kSplit;
    Span span = {from > 0 ? from : 0, last + 1 < kSplit ? last + 1 : kSplit};
    if (span.empty()) span = Span{0, 0};
    return span;
}

// Blocks of at most kAttendRows rows, as even as can be.
struct RowBlocks {
    int rows, count;
    explicit RowBlocks(int n) : rows(n), count((n + kAttendRows - 1) / kAttendRows) {}
    int start(int block) const { return rows * block / count; }
};

}  // namespace ER_ISA
}  // namespace engineroom
