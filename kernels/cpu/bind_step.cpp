// The Python face of the step program, its pool and its cache.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "experts.hpp"
#include "operations.hpp"
#include "step.hpp"

namespace nb = nanobind;

namespace engineroom {

namespace {

using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Slot = std::tuple<std::size_t, int, bool>;  // a Value: column, width, per logit row

using Place = std::tuple<int, std::vector<int>>;  // a Core: node, CPUs

std::vector<Place> places_of(const std::vector<Core> &cores) {
    std::vector<Place> places;
    for (const Core &core : cores) places.emplace_back(core.node, core.cpus);
    return places;
}

std::vector<Core> cores_of(const std::vector<Place> &places) {
    std::vector<Core> cores;
    for (const auto &[node, cpus] : places) cores.push_back({node, cpus});
    return cores;
}

Value value_of(const Slot &slot) { return {std::get<0>(slot), std::get<1>(slot), std::get<2>(slot)}; }

template <class T>
T one_of(const std::string &name, std::initializer_list<std::pair<const char *, T>> known) {
    std::string names;
    for (const auto &[key, value] : known) {
        if (name == key) return value;
        names += std::string(names.empty() ? "" : ", ") + key;
    }
    throw std::invalid_argument("'" + name + "' is none of " + names);
}

Dtype dtype_of(const std::string &name) {
    return one_of<Dtype>(
        name, {{"float32", Dtype::kF32}, {"bfloat16", Dtype::kBF16}, {"float16", Dtype::kF16}});
}

Dtype cache_dtype_of(const std::string &name) {
    return name == "int8"   ? Dtype::kInt8
           : name == "int4" ? Dtype::kInt4
           : name == "fp8"  ? Dtype::kFp8
                            : dtype_of(name);
}

Form form_of(const std::string &name) {
    return one_of<Form>(
        name, {{"float32", Form::kF32}, {"bfloat16", Form::kBF16}, {"int8", Form::kInt8}});
}

Epilogue epilogue_of(const std::string &name) {
    return one_of<Epilogue>(name, {{"store", Epilogue::kStore},
                                   {"add", Epilogue::kAddResidual},
                                   {"silu_mul", Epilogue::kSiluMul},
                                   {"gelu_tanh_mul", Epilogue::kGeluMul},
                                   {"clamped_silu_mul", Epilogue::kClampedSiluMul}});
}

// The StepProgram and the Python objects whose memory its operations point into.
class BoundProgram {
  public:
    BoundProgram(const std::string &isa, std::shared_ptr<Pool> pool, std::shared_ptr<KVCache> cache,
                 int vocab_size, std::size_t token_columns, std::size_t row_columns, Slot result)
        : cache_(std::move(cache)),
          program_(kernels_named(isa), std::move(pool), cache_, vocab_size, token_columns, row_columns,
                   value_of(result)) {}

    void embedding(bool barrier, Slot out, nb::list parts, const std::string &dtype) {
        std::vector<TablePart> table;
        const Value to = value_of(out);
        int begin = 0;
        for (nb::handle item : parts) {
            TablePart part{begin, begin};
            if (nb::isinstance<PackedMatrix>(item)) {
                part.tiles = &nb::cast<const PackedMatrix &>(item).weight();
                part.end += part.tiles->num_rows;
                if (part.tiles->num_columns != to.width)
                    throw std::invalid_argument("an embedding table's tiles have rows of " +
                                                std::to_string(part.tiles->num_columns) + ", not " +
                                                std::to_string(to.width));
            } else {
                const auto rows = nb::cast<std::tuple<std::string, Bytes, int>>(item);
                const std::size_t width = static_cast<std::size_t>(to.width);
                part.format = find_dequant_format(std::get<0>(rows).c_str());
                part.data = std::get<1>(rows).data();
                part.end += std::get<2>(rows);
                if (part.format == nullptr || width % part.format->block_elements != 0)
                    throw std::invalid_argument("an embedding table of " + std::get<0>(rows) +
                                                " cannot have rows of " + std::to_string(to.width));
                part.row_bytes = part.format->row_bytes(width);
                if (std::get<1>(rows).shape(0) !=
                    part.row_bytes * static_cast<std::size_t>(std::get<2>(rows)))
                    throw std::invalid_argument("an embedding table's bytes do not match its rows");
            }
            begin = part.end;
            table.push_back(part);
            kept_.append(item);
        }
        add(barrier, std::make_unique<Embedding>(to, std::move(table), dtype_of(dtype)));
    }

    void rms_norm(bool barrier, Slot x, Slot out, Floats weight, float eps, float offset,
                  const std::string &dtype) {
        add(barrier, std::make_unique<Normalise>(value_of(x), value_of(out), keep(weight),
                                                 static_cast<int>(weight.shape(0)), eps, offset,
                                                 dtype_of(dtype)));
    }

    void map(bool barrier, const std::string &name, Slot a, Slot b, Slot out, float parameter,
             const std::string &dtype) {
        const Elementwise kind = one_of<Elementwise>(name, {{"add", Elementwise::kAdd},
                                                            {"scale", Elementwise::kScale},
                                                            {"softcap", Elementwise::kSoftcap},
                                                            {"silu_mul", Elementwise::kSiluMul},
                                                            {"gelu_tanh_mul", Elementwise::kGeluMul},
                                                            {"clamped_silu_mul",
                                                             Elementwise::kClampedSiluMul}});
        add(barrier, std::make_unique<Map>(kind, value_of(a), value_of(b), value_of(out), parameter,
                                           dtype_of(dtype)));
    }

    void select_rows(bool barrier, Slot x, Slot out) {
        add(barrier, std::make_unique<SelectRows>(value_of(x), value_of(out)));
    }

    void rotations(bool barrier, Slot out, std::vector<float> inv_freq, float factor) {
        add(barrier, std::make_unique<Rotations>(value_of(out), std::move(inv_freq), factor));
    }

    void rope(bool barrier, Slot x, Slot rotations, Slot out, int head_dim, bool interleaved,
              const std::string &dtype) {
        add(barrier, std::make_unique<Rope>(value_of(x), value_of(rotations), value_of(out), head_dim,
                                            interleaved, dtype_of(dtype)));
    }

    void kv_write(bool barrier, Slot k, Slot v, int layer) {
        add(barrier, std::make_unique<WriteKV>(value_of(k), value_of(v), cache_->layer(layer)));
    }

    void attention(bool barrier, Slot q, Slot out, int layer, int num_heads, float scale, int window,
                   float softcap, std::optional<Floats> sinks, const std::string &dtype) {
        if (sinks && sinks->shape(0) != static_cast<std::size_t>(num_heads))
            throw std::invalid_argument(std::to_string(sinks->shape(0)) + " sinks for " +
                                        std::to_string(num_heads) + " query heads");
        Attention attention;
        attention.cache = cache_->layer(layer);
        attention.num_heads = num_heads;
        attention.scale = scale;
        attention.window = window;
        attention.softcap = softcap;
        attention.sinks = sinks ? keep(*sinks) : nullptr;
        attention.dtype = dtype_of(dtype);
        add(barrier, std::make_unique<Attend>(value_of(q), value_of(out), attention));
    }

    // weights: (PackedMatrix, bias or None, value of the result, first column there)
    void linear(bool barrier, Slot x, const std::string &form, std::optional<Floats> norm, float eps,
                float offset, nb::list weights, const std::string &epilogue,
                std::optional<Slot> residual, const std::string &norm_dtype,
                const std::string &dtype, std::optional<Ints> order) {
        InputNorm input;
        if (norm) input = {keep(*norm), eps, offset, dtype_of(norm_dtype)};
        if (order) input.order = order_of(*order, std::get<1>(x));
        std::vector<LinearWeight> all;
        for (nb::handle item : weights) {
            using Entry = std::tuple<std::shared_ptr<PackedMatrix>, std::optional<Floats>, Slot, int>;
            auto entry = nb::cast<Entry>(item);
            if (std::get<0>(entry)->weight().num_columns != std::get<1>(x))
                throw std::invalid_argument("a weight's columns differ from its input's width");
            const std::optional<Floats> &bias = std::get<1>(entry);
            all.push_back({std::get<0>(entry), bias ? keep(*bias) : nullptr,
                           value_of(std::get<2>(entry)), std::get<3>(entry)});
        }
        if (all.empty() || all.size() > LinearLayer::kMaxParts)
            throw std::invalid_argument("a linear layer of " + std::to_string(all.size()) +
                                        " weights; it takes 1 to " +
                                        std::to_string(LinearLayer::kMaxParts));
        std::optional<Value> added;
        if (residual) added = value_of(*residual);
        add(barrier,
            std::make_unique<LinearLayer>(
                value_of(x), form_of(form), input, std::move(all), epilogue_of(epilogue), added,
                dtype_of(dtype)));
    }

    void top_experts(bool barrier, Slot logits, Slot out) {
        add(barrier, std::make_unique<TopExperts>(value_of(logits), value_of(out)));
    }

    void expert_weights(bool barrier, Slot logits, Slot experts, Slot out, bool renormalise,
                        const std::string &dtype) {
        add(barrier, std::make_unique<ExpertWeights>(value_of(logits), value_of(experts), value_of(out),
                                                     renormalise, dtype_of(dtype)));
    }

    void expert_linear(bool barrier, Slot x, Slot experts, Slot out, const std::string &form,
                       std::vector<std::shared_ptr<PackedMatrix>> matrices,
                       std::vector<Floats> biases, const std::string &epilogue,
                       const std::string &dtype) {
        const Epilogue end = epilogue_of(epilogue);
        const Value rows = value_of(x), places = value_of(experts), to = value_of(out);
        if (matrices.empty() || (is_paired(end) && matrices.size() % 2 == 1))
            throw std::invalid_argument(std::to_string(matrices.size()) + " matrices for " + epilogue);
        for (const auto &matrix : matrices) {
            const PackedWeight &weight = matrix->weight();
            if ((rows.width != weight.num_columns && rows.width != places.width * weight.num_columns) ||
                to.width != places.width * weight.num_rows)
                throw std::invalid_argument("an expert's weight of [" + std::to_string(weight.num_rows) +
                                            ", " + std::to_string(weight.num_columns) +
                                            "] does not fit its input or its result");
        }
        std::vector<const float *> added;
        for (const Floats &bias : biases) {
            const int rows_of_all = matrices[0]->weight().num_rows *
                                    static_cast<int>(matrices.size() / biases.size());
            if (bias.shape(0) != static_cast<std::size_t>(rows_of_all))
                throw std::invalid_argument("a bias of " + std::to_string(bias.shape(0)) +
                                            " for experts of " + std::to_string(rows_of_all) +
                                            " rows together");
            added.push_back(keep(bias));
        }
        add(barrier, std::make_unique<ExpertLayer>(rows, places, to, form_of(form), std::move(matrices),
                                                   std::move(added), end, dtype_of(dtype)));
    }

    void expert_sum(bool barrier, Slot x, Slot weights, Slot out, const std::string &dtype) {
        add(barrier, std::make_unique<ExpertSum>(value_of(x), value_of(weights), value_of(out),
                                                 dtype_of(dtype)));
    }

    void sigmoid_scale(bool barrier, Slot x, Slot gate, Slot out, const std::string &dtype) {
        add(barrier, std::make_unique<SigmoidScale>(value_of(x), value_of(gate), value_of(out),
                                                    dtype_of(dtype)));
    }

    // The result's rows; None where they lie where the last run's lay.
    nb::object run(Ints token_ids, Ints positions, Ints query_start, Ints seq_len,
                   Table block_table, Ints slot, Ints logit_rows) {
        StepView step;
        step.num_tokens = static_cast<int>(token_ids.shape(0));
        step.num_sequences = static_cast<int>(seq_len.shape(0));
        step.num_rows = static_cast<int>(logit_rows.shape(0));
        step.max_blocks = static_cast<int>(block_table.shape(1));
        const std::size_t tokens = token_ids.shape(0), sequences = seq_len.shape(0);
        if (positions.shape(0) != tokens || slot.shape(0) != tokens ||
            query_start.shape(0) != sequences + 1 || block_table.shape(0) != sequences)
            throw std::invalid_argument("the arrays of a step disagree about T or S");
        step.token_ids = token_ids.data();
        step.positions = positions.data();
        step.query_start = query_start.data();
        step.seq_len = seq_len.data();
        step.block_table = block_table.data();
        step.slot = slot.data();
        step.logit_rows = logit_rows.data();
        const float *result;
        {
            nb::gil_scoped_release unlocked;
            result = program_.run(step);
        }
        const std::size_t rows = logit_rows.shape(0);
        if (result == logits_at_ && rows == num_logits_) return nb::none();
        logits_at_ = result;
        num_logits_ = rows;
        const std::size_t shape[2] = {rows, static_cast<std::size_t>(program_.result_width())};
        return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(const_cast<float *>(result), 2,
                                                                   shape, nb::find(*this)));
    }

    std::size_t workspace_bytes() const { return program_.workspace_bytes(); }

  private:
    static const Kernels *kernels_named(const std::string &isa) {
        const Kernels *kernels = find_kernels(isa.empty() ? nullptr : isa.c_str());
        if (kernels == nullptr)
            throw std::invalid_argument("this machine cannot run the kernels '" + isa + "'");
        return kernels;
    }
    // The places that a linear layer's columns take their values from, each of `columns` once.
    const std::int32_t *order_of(const Ints &order, int columns) {
        std::vector<bool> seen(static_cast<std::size_t>(columns));
        bool fits = order.shape(0) == seen.size();
        for (std::size_t i = 0; fits && i < seen.size(); ++i) {
            const std::int32_t at = order.data()[i];
            fits = at >= 0 && at < columns && !seen[static_cast<std::size_t>(at)];
            if (fits) seen[static_cast<std::size_t>(at)] = true;
        }
        if (!fits)
            throw std::invalid_argument("an order of " + std::to_string(order.shape(0)) +
                                        " places is none of the input's " + std::to_string(columns) +
                                        " columns, each once");
        kept_.append(nb::cast(order));
        return order.data();
    }
    const float *keep(const Floats &array) {
        kept_.append(nb::cast(array));
        return array.data();
    }
    void add(bool barrier, std::unique_ptr<Operation> operation) {
        operation->barrier_before = barrier;
        program_.append(std::move(operation));
    }

    std::shared_ptr<KVCache> cache_;
    StepProgram program_;
    nb::list kept_;
    const float *logits_at_ = nullptr;  // of the last run
    std::size_t num_logits_ = static_cast<std::size_t>(-1);
};

// Bytes that a step of max_tokens tokens, max_rows logit rows and max_context positions takes, which no
// smaller step exceeds. inputs: of linear layers, the form, the columns, and whether there is one a logit
// row. top_k of num_experts, and expert_columns, the widest of their rows, are 0 where there are none.
std::size_t workspace_bound(std::size_t token_columns, std::size_t row_columns,
                            const std::vector<std::tuple<std::string, int, bool>> &inputs, int num_heads, int num_kv_heads, int head_dim, int max_tokens,
                            int max_rows, int max_context, int threads, int expert_columns,
                            int top_k, int num_experts) {
    const std::size_t arenas = sizeof(float) * (token_columns * static_cast<std::size_t>(max_tokens) +
                                                row_columns * static_cast<std::size_t>(max_rows));
    Attention attention;
    attention.num_heads = num_heads;
    attention.cache.num_kv_heads = num_kv_heads;
    attention.cache.head_dim = head_dim;
    const std::size_t pairs =
        static_cast<std::size_t>(top_k) * static_cast<std::size_t>(std::max(max_tokens, max_rows));
    const std::size_t lists = expert_list_bytes(pairs, num_experts) * static_cast<std::size_t>(threads);
    const std::size_t shared = std::max(
        num_heads ? attention_shared_bound(attention, max_tokens, max_tokens, max_context, threads) : 0,
        top_k ? lists : 0);
    std::size_t prepared = 0, linear = 0;
    for (const auto &[name, width, per_row] : inputs) {
        const Form form = form_of(name);
        const int rows = per_row ? max_rows : max_tokens;
        if (rows > kPreparedAlone)
            prepared = std::max(prepared, engineroom::prepared_bytes(form, width, rows));
        linear = std::max(linear, padded(sizeof(float) * 2 * static_cast<std::size_t>(width)) +
                                      padded(engineroom::prepared_bytes(form, width, kPreparedAlone)) +
                                      linear_scratch_bytes(width));
    }
    const std::size_t scratch =
        padded(std::max({linear, num_heads ? attention_scratch_bytes(attention) : 0,
                         top_k ? expert_scratch_bytes(Form::kF32, expert_columns) : 0})) +
        4096;
    return arenas + prepared + shared + scratch * static_cast<std::size_t>(threads) + 5 * std::size_t{64};
}

}  // namespace

void register_step(nb::module_ &m) {
    nb::class_<Pool>(m, "Pool")
        .def(nb::init<int>(), nb::arg("threads"))
        .def("__init__",
             [](Pool *self, int threads, const std::vector<Place> &places) {
                 if (static_cast<std::size_t>(threads) != places.size())
                     throw std::invalid_argument(std::to_string(places.size()) + " places for " +
                                                 std::to_string(threads) + " threads");
                 new (self) Pool(threads, cores_of(places));
             },
             nb::arg("threads"), nb::arg("places"))
        .def_prop_ro("size", &Pool::size)
        .def_prop_ro("places", [](const Pool &pool) { return places_of(pool.places()); })
        .def("cpus", [](Pool &pool) {
            std::vector<std::vector<int>> cpus(static_cast<std::size_t>(pool.size()));
            pool.run([&](int thread) { cpus[static_cast<std::size_t>(thread)] = thread_cpus(); });
            return cpus;
        });
    m.def("usable_cores", &usable_cores);
    m.def("find_cores", [](const std::string &sys, const std::vector<int> &allowed) {
        return places_of(find_cores(sys, allowed));
    }, nb::arg("sys"), nb::arg("allowed"));
    m.def("place_threads", [](const std::vector<Place> &cores, int threads) {
        return places_of(place_threads(cores_of(cores), threads));
    }, nb::arg("cores"), nb::arg("threads"));
    m.def("packed_bytes", [](const std::string &format, int num_rows, int num_columns) {
        return packed_bytes(packed_layout(format.c_str(), num_rows, num_columns));
    });
    m.def("workspace_bound", &workspace_bound);
    nb::class_<KVCache>(m, "KVCache")
        .def("__init__",
             [](KVCache *self, const std::string &key_dtype, const std::string &value_dtype,
                int num_layers, int num_kv_heads, int head_dim, int block_size, int num_blocks) {
                 if (num_layers < 1 || num_kv_heads < 1 || head_dim < 2 || head_dim % 2 != 0 ||
                     block_size < 1 || num_blocks < 1)
                     throw std::invalid_argument("a KV cache needs positive sizes and an even head_dim");
                 const Dtype keys = cache_dtype_of(key_dtype), values = cache_dtype_of(value_dtype);
                 if (!is_kv_pair(keys, values))
                     throw std::invalid_argument("there is no KV cache of " + key_dtype +
                                                 " keys with " + value_dtype + " values");
                 new (self) KVCache(keys, values, num_layers, num_kv_heads, head_dim, block_size,
                                    num_blocks);
             })
        .def_prop_ro("nbytes", &KVCache::bytes);
    nb::class_<BoundProgram>(m, "StepProgram")
        .def(nb::init<const std::string &, std::shared_ptr<Pool>, std::shared_ptr<KVCache>, int,
                      std::size_t, std::size_t, Slot>(),
             nb::arg("isa"), nb::arg("pool"), nb::arg("cache").none(), nb::arg("vocab_size"),
             nb::arg("token_columns"), nb::arg("row_columns"), nb::arg("result"))
        .def("embedding", &BoundProgram::embedding)
        .def("rms_norm", &BoundProgram::rms_norm)
        .def("map", &BoundProgram::map)
        .def("select_rows", &BoundProgram::select_rows)
        .def("rotations", &BoundProgram::rotations)
        .def("rope", &BoundProgram::rope)
        .def("kv_write", &BoundProgram::kv_write)
        .def("attention", &BoundProgram::attention)
        .def("top_experts", &BoundProgram::top_experts)
        .def("expert_weights", &BoundProgram::expert_weights)
        .def("expert_linear", &BoundProgram::expert_linear)
        .def("expert_sum", &BoundProgram::expert_sum)
        .def("sigmoid_scale", &BoundProgram::sigmoid_scale)
        .def_prop_ro("workspace_bytes", &BoundProgram::workspace_bytes)
        .def("linear", &BoundProgram::linear, nb::arg("barrier"), nb::arg("x"), nb::arg("form"),
             nb::arg("norm").none(), nb::arg("eps"), nb::arg("offset"), nb::arg("weights"),
             nb::arg("epilogue"), nb::arg("residual").none(), nb::arg("norm_dtype"), nb::arg("dtype"),
             nb::arg("order").none() = nb::none())
        .def("run", &BoundProgram::run, nb::arg("token_ids").noconvert(),
             nb::arg("positions").noconvert(), nb::arg("query_start").noconvert(),
             nb::arg("seq_len").noconvert(), nb::arg("block_table").noconvert(),
             nb::arg("slot").noconvert(), nb::arg("logit_rows").noconvert());
}

}  // namespace engineroom
