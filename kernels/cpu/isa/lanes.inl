// What units without instructions for it do lane by lane; inside a unit's namespace.

// Sums of products begin as i_begin(start), further ones of the same group as i_begin_like(one, start),
// `start` being start_of(x); f_of_sum of such a sum is x more than its products.
ER_INLINE std::int32_t start_of(std::int32_t x) { return x; }
ER_INLINE I i_begin(const std::int32_t *start) { return i_bcast(start); }
ER_INLINE I i_begin_like(I, const std::int32_t *start) { return i_bcast(start); }
ER_INLINE F f_of_sum(I sum, const std::int32_t *) { return f_of_i(sum); }
// Lane i: the largest number of x[i].
ER_INLINE F f_max_each(const F (&x)[16]) {
    float most[16];
    for (int i = 0; i < 16; ++i) most[i] = f_max_all(x[i]);
    return f_load(most);
}
// Lane 4 i + j: the sum of lanes 4 j to 4 j + 3 of x[i].
ER_INLINE I i_sum_fours(const I (&x)[4]) {
    std::int32_t lanes[64], sums[16];
    for (int i = 0; i < 4; ++i) i_store(lanes + 16 * i, x[i]);
    for (int i = 0; i < 16; ++i)
        sums[i] = (lanes[4 * i] + lanes[4 * i + 1]) + (lanes[4 * i + 2] + lanes[4 * i + 3]);
    return i_load(sums);
}
