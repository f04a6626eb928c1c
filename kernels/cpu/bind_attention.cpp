// What Python calls of attention and row-wise operations: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attention.hpp"
#include "bindings.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

using In = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using InRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutRows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntRows = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string &message) { throw nb::value_error(message.c_str()); }
void check(bool holds, const char *message) {
    if (!holds) refuse(message);
}

const Kernels &unit_of(const std::string &name) {
    const Kernels *kernels = find_kernels(name.c_str());
    if (kernels == nullptr) refuse("this machine cannot run the unit '" + name + "'");
    return *kernels;
}

Dtype dtype_of(const std::string &name) {
    if (name == "float32") return Dtype::kF32;
    if (name == "bfloat16") return Dtype::kBF16;
    if (name == "float16") return Dtype::kF16;
    refuse("unknown dtype '" + name + "'; supported: float32, bfloat16, float16");
}

Dtype cache_dtype_of(const std::string &name) {
    return name == "int8"   ? Dtype::kInt8
           : name == "int4" ? Dtype::kInt4
           : name == "fp8"  ? Dtype::kFp8
                            : dtype_of(name);
}

void rows_test(const std::string &unit, const std::string &op, In x, In y, Out out, float a,
               float b) {
    const Kernels &kernels = unit_of(unit);
    const int n = static_cast<int>(x.shape(0));
    check(out.shape(0) == x.shape(0), "out must be as long as x");
    const bool binary =
        op == "rms_norm" || op == "add" || op == "silu_mul" || op == "gelu_tanh_mul" ||
        op == "clamped_silu_mul";
    check(!binary || y.shape(0) == x.shape(0), "y must be as long as x");
    if (op == "rms_norm") {
        kernels.rms_norm(x.data(), y.data(), out.data(), n, a, b, Dtype::kF32);
    } else if (op == "add") {
        kernels.add(x.data(), y.data(), out.data(), n);
    } else if (op == "scale") {
        kernels.scale(x.data(), a, out.data(), n);
    } else if (op == "softcap") {
        kernels.softcap(x.data(), a, out.data(), n);
    } else if (op == "silu_mul") {
        kernels.silu_mul(x.data(), y.data(), out.data(), n);
    } else if (op == "gelu_tanh_mul") {
        kernels.gelu_tanh_mul(x.data(), y.data(), out.data(), n);
    } else if (op == "clamped_silu_mul") {
        kernels.clamped_silu_mul(x.data(), y.data(), out.data(), n);
    } else if (op == "float32" || op == "bfloat16" || op == "float16") {
        std::copy(x.data(), x.data() + n, out.data());
        kernels.round(out.data(), n, dtype_of(op));
    } else {
        refuse("unknown operation '" + op + "'");
    }
}

void rope_test(const std::string &unit, In x, In cos, In sin, Out out, int head_dim,
               bool interleaved) {
    const Kernels &kernels = unit_of(unit);
    check(head_dim > 0 && x.shape(0) % static_cast<std::size_t>(head_dim) == 0,
          "x must be whole heads");
    check(out.shape(0) == x.shape(0), "out must be as long as x");
    check(cos.shape(0) == sin.shape(0) && 2 * cos.shape(0) <= static_cast<std::size_t>(head_dim),
          "cos and sin must be equally long and fit a head");
    kernels.rope(x.data(), cos.data(), sin.data(), out.data(),
                 static_cast<int>(x.shape(0)) / head_dim, head_dim, static_cast<int>(cos.shape(0)),
                 interleaved);
}

void to_bf16_test(const std::string &unit, In x, Array<std::uint16_t> out) {
    check(out.shape(0) >= x.shape(0) && out.shape(0) % kGroup == 0,
          "out must be a multiple of 32, no shorter than x");
    unit_of(unit).to_bf16(x.data(), static_cast<int>(x.shape(0)), static_cast<int>(out.shape(0)),
                          out.data());
}

int to_int8_test(const std::string &unit, In x, Array<std::int8_t> q, Out scale,
                 Array<std::int32_t> sum16, Out scaled_sum, Array<std::int32_t> fine_group,
                 Array<std::int8_t> fine_q, Out fine_scale, Array<std::int32_t> fine_sum16) {
    const std::size_t stride = q.shape(0);
    check(stride >= x.shape(0) && stride % kGroup == 0 && fine_q.shape(0) == stride,
          "q must be a multiple of 32, no shorter than x, and fine_q as long");
    check(scale.shape(0) == stride / 32 && scaled_sum.shape(0) == stride / 32 &&
              fine_scale.shape(0) == stride / 32 && fine_group.shape(0) == stride / 32 &&
              sum16.shape(0) == stride / 16 && fine_sum16.shape(0) == stride / 16,
          "scales, scaled_sum and fine_group take one number per 32, sums one per 16");
    std::int32_t fine_count = 0;
    unit_of(unit).to_int8(x.data(), static_cast<int>(x.shape(0)), static_cast<int>(stride),
                          Int8Row{q.data(), scale.data(), sum16.data(), scaled_sum.data(),
                                  &fine_count, fine_group.data(), fine_q.data(), fine_scale.data(),
                                  fine_sum16.data()});
    return fine_count;
}

// Writes k and v of a packed step to `cache` (one layer, blocks end to end), then runs attention.
// Where `repeats` is not 0, attention runs that often and the seconds of the fastest are returned.
double attention_test(const std::string &unit, const std::string &key_dtype,
                      const std::string &value_dtype, Array<std::uint8_t> cache, int block_size, int num_kv_heads, int head_dim,
                      InRows q, InRows k, InRows v, Ints positions, Ints query_start, Ints seq_len,
                      IntRows block_table, Ints slot, OutRows out, float scale, int window,
                      float softcap, const std::string &dtype, int threads, int repeats) {
    const Kernels &kernels = unit_of(unit);
    Attention attention;
    KVCacheView &view = attention.cache;
    check(block_size > 0 && num_kv_heads > 0 && head_dim > 0 && head_dim % 2 == 0,
          "block_size, num_kv_heads and head_dim must be above 0, head_dim even");
    check(threads >= 1 && threads <= 64, "threads must be 1 to 64");
    const Dtype keys = cache_dtype_of(key_dtype), values = cache_dtype_of(value_dtype);
    check(is_kv_pair(keys, values), "there is no cache of such keys with such values");
    view = kv_cache_view(keys, values, num_kv_heads, head_dim, block_size);
    view.layer = cache.data();
    const auto num_blocks = static_cast<std::int64_t>(cache.shape(0) / view.block_stride);

    const std::size_t num_tokens = slot.shape(0), num_sequences = seq_len.shape(0);
    const std::size_t kv_width = static_cast<std::size_t>(num_kv_heads * head_dim);
    check(q.shape(0) == num_tokens && k.shape(0) == num_tokens && v.shape(0) == num_tokens &&
              positions.shape(0) == num_tokens && out.shape(0) == num_tokens,
          "q, k, v, positions, slot and out must have a row per token");
    check(k.shape(1) == kv_width && v.shape(1) == kv_width, "k and v must have all kv heads' dims");
    check(q.shape(1) > 0 && q.shape(1) % kv_width == 0 && out.shape(1) == q.shape(1),
          "q and out must have whole groups of heads");
    check(query_start.shape(0) == num_sequences + 1 && block_table.shape(0) == num_sequences,
          "query_start has S + 1 entries, block_table S rows");
    check(query_start(0) == 0, "query_start must begin with 0");
    for (std::size_t s = 0; s < num_sequences; ++s) {
        check(query_start(s) <= query_start(s + 1) &&
                  query_start(s + 1) <= static_cast<std::int64_t>(num_tokens),
              "query_start must ascend within the tokens");
        const std::int64_t length = seq_len(s), blocks = (length + block_size - 1) / block_size;
        check(length >= 0 && blocks <= static_cast<std::int64_t>(block_table.shape(1)),
              "a sequence is longer than its blocks");
        for (std::size_t i = 0; i < static_cast<std::size_t>(blocks); ++i)
            check(block_table(s, i) >= 0 && block_table(s, i) < num_blocks,
                  "a block is outside the cache");
    }
    for (std::size_t t = 0; t < num_tokens; ++t)
        check(slot(t) >= -1 && slot(t) < num_blocks * block_size, "a slot is outside the cache");

    attention.num_heads = static_cast<int>(q.shape(1)) / head_dim;
    attention.scale = scale;
    attention.window = window;
    attention.softcap = softcap;
    attention.dtype = dtype_of(dtype);
    StepView step;
    step.num_tokens = static_cast<int>(num_tokens);
    step.num_sequences = static_cast<int>(num_sequences);
    step.max_blocks = static_cast<int>(block_table.shape(1));
    step.positions = positions.data();
    step.query_start = query_start.data();
    step.seq_len = seq_len.data();
    step.block_table = block_table.data();
    step.slot = slot.data();

    nb::gil_scoped_release unlocked;
    Pool pool(threads);
    std::vector<std::uint8_t> shared(attention_shared_bytes(attention, step, threads));
    const std::size_t scratch_bytes = (attention_scratch_bytes(attention) + 63) / 64 * 64;
    std::vector<std::uint8_t> scratch(scratch_bytes * static_cast<std::size_t>(threads));
    pool.run([&](int thread) {
        write_kv(kernels, view, step, k.data(), static_cast<std::ptrdiff_t>(k.shape(1)), v.data(),
                 static_cast<std::ptrdiff_t>(v.shape(1)), thread, threads);
    });
    double fastest = std::numeric_limits<double>::infinity();
    for (int i = 0; i < std::max(1, repeats); ++i) {
        const auto begin = std::chrono::steady_clock::now();
        pool.run([&](int thread) {
            const auto width = static_cast<std::ptrdiff_t>(q.shape(1));
            run_attention(kernels, attention, step, q.data(), width, out.data(), width, pool,
                          thread, shared.data(),
                          scratch.data() + scratch_bytes * static_cast<std::size_t>(thread));
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        fastest = std::min(fastest, took.count());
    }
    return fastest;
}

}  // namespace

void register_attention(nb::module_ &m) {
    m.def("rows_test", &rows_test, nb::arg("unit"), nb::arg("op"), nb::arg("x").noconvert(),
          nb::arg("y").noconvert(), nb::arg("out").noconvert(), nb::arg("a") = 0.0f,
          nb::arg("b") = 0.0f, "One row-wise operation on one row, for tests.");
    m.def("rope_test", &rope_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("cos").noconvert(), nb::arg("sin").noconvert(), nb::arg("out").noconvert(),
          nb::arg("head_dim"), nb::arg("interleaved"), "Rotates one row, for tests.");
    m.def("to_bf16_test", &to_bf16_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("out").noconvert(), "A row as an operand of bf16 products, for tests.");
    m.def("to_int8_test", &to_int8_test, nb::arg("unit"), nb::arg("x").noconvert(),
          nb::arg("q").noconvert(), nb::arg("scale").noconvert(), nb::arg("sum16").noconvert(),
          nb::arg("scaled_sum").noconvert(), nb::arg("fine_group").noconvert(),
          nb::arg("fine_q").noconvert(), nb::arg("fine_scale").noconvert(),
          nb::arg("fine_sum16").noconvert());
    m.def("attention_test", &attention_test, nb::arg("unit"), nb::arg("key_dtype"), nb::arg("value_dtype"),
          nb::arg("cache").noconvert(), nb::arg("block_size"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("q").noconvert(), nb::arg("k").noconvert(),
          nb::arg("v").noconvert(), nb::arg("positions").noconvert(),
          nb::arg("query_start").noconvert(), nb::arg("seq_len").noconvert(),
          nb::arg("block_table").noconvert(), nb::arg("slot").noconvert(),
          nb::arg("out").noconvert(), nb::arg("scale"), nb::arg("window") = 0,
          nb::arg("softcap") = 0.0f, nb::arg("dtype") = "float32", nb::arg("threads") = 1,
          nb::arg("repeats") = 0,
          "Writes a step's k and v to a cache, runs attention and returns seconds, for tests.");
}

}  // namespace engineroom
