// What is done to a row's logits before any filter: biases, bans, the grammar's mask, penalties.
#include <algorithm>
#include <cstring>

#include "sample_math.hpp"
#include "sample_parts.hpp"

namespace engineroom {
namespace sampling {

const float *adjust(const float *x, const SampleRows &rows, int r, int n, SampleWork &work) {
    const int bias = rows.bias_start[r], bias_end = rows.bias_start[r + 1];
    const int ban = rows.ban_start[r], ban_end = rows.ban_start[r + 1];
    const int history = rows.history_start[r], history_end = rows.history_start[r + 1];
    const float factor = rows.repetition_penalty[r], presence = rows.presence_penalty[r];
    const float frequency = rows.frequency_penalty[r];
    const bool penalised =
        history_end > history && (factor != 1.0f || presence != 0.0f || frequency != 0.0f);
    if (bias == bias_end && ban == ban_end && rows.mask_row[r] == 0 && !penalised) return x;
    float *out = work.x.data();
    std::memcpy(out, x, static_cast<std::size_t>(n) * sizeof(float));
    for (int i = bias; i < bias_end; ++i) {
        out[rows.bias_ids[i]] = x[rows.bias_ids[i]] + rows.bias_values[i];
    }
    for (int i = ban; i < ban_end; ++i) out[rows.ban_ids[i]] = -kInfinity;
    if (rows.mask_row[r] != 0) {
        const std::uint32_t *mask = rows.mask_table + rows.mask_row[r] * rows.mask_words;
        for (int start = 0; start < n; start += 32) {
            const std::uint32_t allowed = mask[start / 32];
            if (allowed == 0xffffffffu) continue;
            const int end = std::min(n, start + 32);
            for (int i = start; i < end; ++i) {
                if (!(allowed >> (i - start) & 1u)) out[i] = -kInfinity;
            }
        }
    }
    for (int i = history; penalised && i < history_end; ++i) {
        float &seen = out[rows.history_ids[i]];
        const std::int32_t count = rows.history_count[i];
        seen = seen > 0.0f ? seen / factor : seen * factor;
        seen = seen - frequency * static_cast<float>(count);
        seen = seen - (count > 0 ? presence : 0.0f);
    }
    return out;
}

}  // namespace sampling
}  // namespace engineroom
