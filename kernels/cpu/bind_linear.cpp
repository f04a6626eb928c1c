// What Python calls of linear layers: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "linear.hpp"
#include "packed_matrix.hpp"
#include "pages.hpp"
#include "pool.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

std::size_t padded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class Value, int kCount>
Value choose(const char *what, const std::string &name, const char *const (&names)[kCount]) {
    std::string known;
    for (int i = 0; i < kCount; ++i) {
        if (name == names[i]) return static_cast<Value>(i);
        known += (i ? ", " : "") + std::string(names[i]);
    }
    throw std::invalid_argument("unknown " + std::string(what) + " '" + name +
                                "'; known: " + known);
}

constexpr const char *kFormNames[] = {"f32", "bf16", "int8"};
constexpr const char *kEpilogueNames[] = {"store", "add_residual", "silu_mul", "gelu_mul",
                                          "clamped_silu_mul"};
constexpr const char *kDtypeNames[] = {"float32", "bfloat16", "float16"};

void require(bool holds, const std::string &message) {
    if (!holds) throw std::invalid_argument(message);
}

std::string shape_of(std::size_t rows, std::size_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

bool multiplies(Form form, const PackedWeight &weight) {
    switch (form) {
        case Form::kF32: return true;
        case Form::kBF16: return weight.is_bf16();
        case Form::kInt8: return weight.has_integers();
    }
    return false;
}

void linear_test(const std::string &isa_name, const std::vector<const PackedMatrix *> &weights,
                 Matrix x, const std::string &form_name, const std::string &epilogue_name,
                 const std::string &dtype_name, const std::vector<std::optional<Vector>> &biases,
                 std::optional<Matrix> residual, std::optional<Vector> norm_weight, float eps,
                 float offset, int threads, std::vector<Result> outs) {
    const Kernels *kernels = find_kernels(isa_name.c_str());
    require(kernels != nullptr, "this machine has no kernels named '" + isa_name + "'");
    const Form form = choose<Form>("form", form_name, kFormNames);
    const Epilogue epilogue = choose<Epilogue>("epilogue", epilogue_name, kEpilogueNames);
    const Dtype dtype = choose<Dtype>("dtype", dtype_name, kDtypeNames);
    require(threads >= 1, "threads must be at least 1, not " + std::to_string(threads));
    require(!weights.empty(), "a linear layer needs at least one weight");
    require(biases.empty() || biases.size() == weights.size(),
            std::to_string(biases.size()) + " biases for " + std::to_string(weights.size()) +
                " weights");
    const bool paired = is_paired(epilogue);
    const std::size_t per_out = paired ? 2 : 1;
    require(weights.size() % per_out == 0,
            epilogue_name + " takes weights in pairs, not " + std::to_string(weights.size()));
    require(outs.size() == weights.size() / per_out,
            epilogue_name + " of " + std::to_string(weights.size()) + " weights has " +
                std::to_string(weights.size() / per_out) + " results, outs has " +
                std::to_string(outs.size()));
    const std::size_t rows = x.shape(0), columns = x.shape(1);
    std::vector<LinearPart> parts(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const PackedWeight &weight = weights[i]->weight();
        const std::size_t outputs = static_cast<std::size_t>(weight.num_rows);
        require(static_cast<std::size_t>(weight.num_columns) == columns,
                "x is " + shape_of(rows, columns) + ", weight " + std::to_string(i) + " is " +
                    shape_of(outputs, static_cast<std::size_t>(weight.num_columns)) +
                    ": K differs");
        require(multiplies(form, weight), form_name + " rows do not multiply " +
                                              weights[i]->format() + " weights");
        require(!paired || i % 2 == 0 || weight.num_rows == weights[i - 1]->weight().num_rows,
                epilogue_name + " needs pairs of equal N");
        parts[i].weight = &weight;
        if (!biases.empty() && biases[i]) {
            require(biases[i]->shape(0) == outputs, "bias " + std::to_string(i) + " has " +
                                                        std::to_string(biases[i]->shape(0)) +
                                                        " values for " + std::to_string(outputs) +
                                                        " outputs");
            parts[i].bias = biases[i]->data();
        }
        if (i % per_out != 0) continue;
        Result &out = outs[i / per_out];
        require(out.shape(0) == rows && out.shape(1) == outputs,
                "result " + std::to_string(i / per_out) + " is " + shape_of(rows, outputs) +
                    ", outs has " + shape_of(out.shape(0), out.shape(1)));
        parts[i].out = out.data();
        parts[i].out_stride = static_cast<std::ptrdiff_t>(outputs);
    }
    Linear linear;
    linear.parts = parts.data();
    linear.num_parts = static_cast<int>(parts.size());
    linear.epilogue = epilogue;
    linear.dtype = dtype;
    if (epilogue == Epilogue::kAddResidual) {
        require(residual.has_value() && weights.size() == 1,
                "add_residual takes a residual and one weight");
        require(residual->shape(0) == rows && residual->shape(1) == outs[0].shape(1),
                "the residual is " + shape_of(residual->shape(0), residual->shape(1)) +
                    ", the result " + shape_of(rows, outs[0].shape(1)));
        linear.residual = residual->data();
        linear.residual_stride = static_cast<std::ptrdiff_t>(residual->shape(1));
    }
    InputNorm norm;
    if (norm_weight) {
        require(norm_weight->shape(0) == columns,
                "the norm has " + std::to_string(norm_weight->shape(0)) + " weights for " +
                    std::to_string(columns) + " columns");
        norm = InputNorm{norm_weight->data(), eps, offset, dtype};
    }
    const int num_rows = static_cast<int>(rows), num_columns = static_cast<int>(columns);
    const float *from = x.data();
    nb::gil_scoped_release unlocked;
    Pool pool(threads);
    const Pages prepared(prepared_bytes(form, num_columns, num_rows));
    const Activations ready = place_activations(form, num_columns, num_rows, prepared.data());
    const std::size_t scratch_bytes =
        padded(linear_scratch_bytes(num_columns) + static_cast<std::size_t>(num_columns) * 4);
    const Pages scratch(scratch_bytes * static_cast<std::size_t>(threads));
    pool.run([&](int thread) {
        std::uint8_t *mine = scratch.data() + scratch_bytes * static_cast<std::size_t>(thread);
        prepare_rows(*kernels, ready, from, num_columns, num_columns, num_rows * thread / threads,
                     num_rows * (thread + 1) / threads, norm, reinterpret_cast<float *>(mine));
        pool.barrier();
        linear_tiles(*kernels, linear, ready, num_rows, thread, threads, mine);
    });
}

// A thread's tiles: (part, first, behind the last).
std::vector<std::tuple<int, int, int>> layer_share(const std::vector<const PackedMatrix *> &weights,
                                                   bool paired, int thread, int threads) {
    std::vector<LinearPart> parts(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) parts[i].weight = &weights[i]->weight();
    std::vector<std::tuple<int, int, int>> found;
    each_share(parts.data(), static_cast<int>(parts.size()), paired, thread, threads,
               [&](int part, Tiles mine) { found.emplace_back(part, mine.begin, mine.end); });
    return found;
}

std::vector<std::string> kernel_tables() {
    std::vector<std::string> names;
    for (int i = 0; usable_kernels(i) != nullptr; ++i) names.emplace_back(usable_kernels(i)->name);
    return names;
}

nb::dict absent_tables() {
    nb::dict tables;
    const char *lacks = nullptr;
    for (int i = 0; const char *name = unusable_kernels(i, &lacks); ++i) tables[name] = lacks;
    return tables;
}

}  // namespace

void register_linear(nanobind::module_ &m) {
    m.def("kernel_tables", &kernel_tables,
          "Names of the kernels that this machine can run, fastest first.");
    m.def("absent_tables", &absent_tables,
          "Kernels of this build that this machine cannot run, and the features that it lacks.");
    m.def("linear_test", &linear_test, nb::arg("isa_name"), nb::arg("weights"),
          nb::arg("x").noconvert(), nb::arg("form") = "f32", nb::arg("epilogue") = "store",
          nb::arg("dtype") = "float32",
          nb::arg("biases") = std::vector<std::optional<Vector>>(),
          nb::arg("residual") = nb::none(), nb::arg("norm_weight") = nb::none(),
          nb::arg("eps") = 0.0f, nb::arg("offset") = 0.0f, nb::arg("threads") = 1, nb::arg("outs"),
          "One linear layer by itself, as a step runs it; for tests.");
    m.def("layer_share", &layer_share, nb::arg("weights"), nb::arg("paired"), nb::arg("thread"),
          nb::arg("threads"), "The tiles of a linear layer that are a thread's; for tests.");
}

}  // namespace engineroom
