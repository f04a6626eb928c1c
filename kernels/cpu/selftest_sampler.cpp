// Self-test of the sampler, whose answers are the same bits on every machine.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "pool.hpp"
#include "sample.hpp"
#include "selftest.hpp"

namespace engineroom {
namespace selftest {

// What every machine must answer, to the bit: tokens and logprobs of check_sampler, FNV-1a. Another
// number is right only where kernels/sampling.py has changed.
constexpr std::uint64_t kSampled = 0xfa2363f9abd8b1c4u;

void check_sampler() {
    Check check("-", "sampler", 2e-5);
    constexpr int kVocab = 999, kRows = 24, kTop = 5;
    Random random{9};
    std::vector<float> logits = random.normals(kRows * kVocab);
    for (float &x : logits) x *= 3;
    // Rows by remainder of 6: greedy, the first alone, sampled from most of the mass, a failure, a
    // given token, greedy with the largest token banned.
    const auto kind = [](int r) { return r % 6; };
    const auto row = [&](int r) { return logits.data() + r * kVocab; };
    const auto first = [&](int r) {
        return static_cast<int>(std::max_element(row(r), row(r) + kVocab) - row(r));
    };
    std::vector<float> temperature(kRows, 1), top_p(kRows, 1), one(kRows, 1), zero(kRows, 0);
    std::vector<std::int32_t> top_k(kRows, 0), target(kRows, -1), num(kRows, kTop), mask(kRows, 0);
    std::vector<std::uint64_t> seed(kRows, 77);
    std::vector<std::uint32_t> index(kRows, 0), position(kRows), table((kVocab + 31) / 32, ~0u);
    std::vector<std::int32_t> none(kRows + 1, 0), ban_start(1, 0), ban_ids;
    for (int r = 0; r < kRows; ++r) {
        position[r] = static_cast<std::uint32_t>(r);
        if (kind(r) == 0 || kind(r) == 5) temperature[r] = 0;
        if (kind(r) == 1) top_k[r] = 1;
        if (kind(r) == 2) top_p[r] = 0.8f;
        if (kind(r) == 3) row(r)[500] = kNaN;
        if (kind(r) == 4) target[r] = 7;
        if (kind(r) == 5) ban_ids.push_back(first(r));
        ban_start.push_back(static_cast<std::int32_t>(ban_ids.size()));
    }
    SampleRows rows = {};
    rows.count = kRows;
    rows.temperature = temperature.data();
    rows.top_k = top_k.data();
    rows.top_p = top_p.data();
    rows.min_p = zero.data();
    rows.typical_p = one.data();
    rows.top_n_sigma = zero.data();
    rows.xtc_probability = zero.data();
    rows.xtc_threshold = zero.data();
    rows.repetition_penalty = one.data();
    rows.presence_penalty = zero.data();
    rows.frequency_penalty = zero.data();
    rows.seed = seed.data();
    rows.sample_index = index.data();
    rows.position = position.data();
    rows.target = target.data();
    rows.num_logprobs = num.data();
    rows.history_start = none.data();
    rows.bias_start = none.data();
    rows.ban_start = ban_start.data();
    rows.ban_ids = ban_ids.data();
    rows.mask_row = mask.data();
    rows.mask_table = table.data();
    rows.mask_words = table.size();

    std::vector<std::int32_t> tokens(kRows), ranks(kRows), top_ids(kRows * kTop), first_tokens;
    std::vector<float> logprobs(kRows), top(kRows * kTop), all(kRows * kVocab);
    std::uint64_t hash = 0;
    for (int threads = 1; threads <= 3; ++threads) {
        RowSampler sampler(kVocab, std::make_shared<Pool>(threads));
        sampler.run(logits.data(), kVocab, rows,
                    SampleAnswers{tokens.data(), logprobs.data(), ranks.data(), top_ids.data(),
                                  top.data(), kTop});
        sampler.log_softmax(logits.data(), kVocab, kRows, all.data());
        std::uint64_t bits = 0xcbf29ce484222325u;
        const auto take = [&bits](const void *from, std::size_t bytes) {
            for (std::size_t i = 0; i < bytes; ++i)
                bits = (bits ^ static_cast<const std::uint8_t *>(from)[i]) * 0x100000001b3u;
        };
        for (int r = 0; r < kRows; ++r) {
            if (kind(r) == 3) continue;  // NaN has many bits
            take(&tokens[r], 4);
            take(&logprobs[r], 4);
            take(all.data() + r * kVocab, 4 * kVocab);
        }
        check.truth(threads == 1 || bits == hash, "the same on threads", threads);
        hash = bits;
    }
    char text[80];
    std::snprintf(text, sizeof text, "bits are %#llx", static_cast<unsigned long long>(hash));
    check.truth(hash == kSampled, text);

    for (int r = 0; r < kRows; ++r) {
        const float *x = row(r);
        if (kind(r) == 3) {
            check.same(tokens[r], -1, "a row with NaN", r);
            continue;
        }
        std::vector<int> order(kVocab);
        for (int i = 0; i < kVocab; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [x](int a, int b) { return x[a] > x[b]; });
        double total = 0, before = 0;
        for (int i = 0; i < kVocab; ++i) total += std::exp(static_cast<double>(x[i]));
        for (int i = 0; i < kVocab; ++i)
            check.near(all[r * kVocab + i], x[i] - std::log(total), 1, "log_softmax", i);
        if (kind(r) == 0 || kind(r) == 1) check.same(tokens[r], order[0], "the first", r);
        if (kind(r) == 4) check.same(tokens[r], 7, "the target", r);
        if (kind(r) == 5) check.same(tokens[r], order[1], "the second", r);
        for (int i = 0; i < kTop; ++i) {
            check.same(top_ids[r * kTop + i], order[i], "top", r);
            check.same_bits(&top[r * kTop + i], &all[r * kVocab + order[i]], 4, "top logprob", r);
        }
        int rank = 0;
        while (order[rank] != tokens[r]) before += std::exp(static_cast<double>(x[order[rank++]]));
        check.same(ranks[r], rank + 1, "rank", r);
        check.same_bits(&logprobs[r], &all[r * kVocab + tokens[r]], 4, "logprob", r);
        if (kind(r) == 2) check.truth(before / total < 0.8001, "beyond the mass", r);
    }
}

}  // namespace selftest
}  // namespace engineroom
