// Self-test of linear layers: their epilogues, and the same bits on any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "pool.hpp"
#include "selftest_products.hpp"

namespace engineroom {
namespace selftest {

void check_linear(const Kernels &k) {
    Random random{7};
    struct Case {
        const char *format;
        Form form;
        Epilogue epilogue;
        Dtype dtype;
        int rows;
    };
    const Case cases[] = {
        {"F32", Form::kF32, Epilogue::kStore, Dtype::kF32, 5},
        {"BF16", Form::kBF16, Epilogue::kAddResidual, Dtype::kBF16, 1},
        {"Q8_0", Form::kInt8, Epilogue::kAddResidual, Dtype::kF32, 3},
        {"Q4_K", Form::kInt8, Epilogue::kSiluMul, Dtype::kF32, 17},
        {"Q6_K", Form::kF32, Epilogue::kGeluMul, Dtype::kF16, 2},
        {"Q4_0", Form::kInt8, Epilogue::kClampedSiluMul, Dtype::kF32, 9},
        {"Q5_1", Form::kInt8, Epilogue::kStore, Dtype::kBF16, 9},
        {"INT8", Form::kInt8, Epilogue::kAddResidual, Dtype::kF32, 1},
        {"INT4", Form::kInt8, Epilogue::kSiluMul, Dtype::kF32, 9},
        {"I4G128", Form::kInt8, Epilogue::kStore, Dtype::kF32, 9},
    };
    for (const Case &c : cases) {
        const double tolerance =
            c.dtype == Dtype::kF32 ? 2e-5 : c.dtype == Dtype::kBF16 ? 2e-2 : 3e-3;
        Check check(k.name, std::string("linear ") + c.format + " x " + name_of(c.form), tolerance);
        const FormatInfo *info = kFormats;
        while (std::strcmp(info->name, c.format) != 0) ++info;
        const int columns = 512, outputs = 500, rows = c.rows;
        const bool paired = is_paired(c.epilogue);
        const Weight a(*info, outputs, columns, random);
        const Weight b(*info, paired ? outputs : 77, columns, random);
        const std::vector<float> x = random.normals(rows * columns), bias = random.normals(outputs);
        const std::vector<float> residual = random.normals(rows * outputs);
        const Rows from(k, c.form, x, rows, columns);

        std::vector<float> out(rows * outputs), second(rows * b.packed.num_rows), first_out;
        LinearPart parts[2];
        parts[0].weight = &a.packed;
        parts[0].bias = bias.data();
        parts[0].out = out.data();
        parts[0].out_stride = outputs;
        parts[1].weight = &b.packed;
        parts[1].out = second.data();
        parts[1].out_stride = b.packed.num_rows;
        Linear linear;
        linear.parts = parts;
        linear.num_parts = c.epilogue == Epilogue::kAddResidual ? 1 : 2;
        linear.epilogue = c.epilogue;
        linear.dtype = c.dtype;
        linear.residual = residual.data();
        linear.residual_stride = outputs;
        for (int threads = 1; threads <= 3; ++threads) {
            std::fill(out.begin(), out.end(), kNaN);
            Pool pool(threads);
            const std::size_t bytes = (linear_scratch_bytes(columns) + 63) / 64 * 64;
            const Memory scratch(bytes * threads), prepared(prepared_bytes(c.form, columns, rows));
            const Activations ready = place_activations(c.form, columns, rows, prepared.data());
            pool.run([&](int thread) {
                prepare_rows(k, ready, x.data(), columns, columns, rows * thread / threads,
                             rows * (thread + 1) / threads, InputNorm(), nullptr);
                pool.barrier();
                linear_tiles(k, linear, ready, rows, thread, threads,
                             scratch.data() + bytes * thread);
            });
            if (threads == 1) first_out = out;
            check.same_bits(out.data(), first_out.data(), 4 * out.size(), "threads", threads);
        }
        for (int r = 0; r < rows; ++r)
            for (int n = 0; n < outputs; ++n) {
                const Product p = product(a, n, from, r);
                double want = p.sum + bias[n], unit = std::fabs(want) + p.size;
                if (c.epilogue == Epilogue::kAddResidual) {
                    want += residual[r * outputs + n];
                    unit = std::max(unit, 1.0);
                } else if (paired) {
                    const Product up = product(b, n, from, r);
                    const bool clamps = c.epilogue == Epilogue::kClampedSiluMul;
                    const double gate = clamps                               ? clamped_silu(want)
                                        : c.epilogue == Epilogue::kSiluMul ? silu(want)
                                                                             : gelu(want);
                    const double by = clamps ? clamped_up(up.sum) : up.sum;
                    want = gate * by;
                    unit = unit * std::fabs(by) + std::fabs(gate) * up.size + up.size;
                }
                if (std::fabs(want) < 60000) check.near(out[r * outputs + n], want, unit, "out", n);
            }
    }
}

}  // namespace selftest
}  // namespace engineroom
