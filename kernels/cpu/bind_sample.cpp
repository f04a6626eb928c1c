// What Python calls of the sampler: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "counter.hpp"
#include "sample.hpp"

namespace nb = nanobind;

namespace engineroom {
namespace {

template <class T>
using Values = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LogitRows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Answer = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using AnswerTable = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(std::size_t have, std::size_t want, const char *what) {
    if (have == want) return;
    throw nb::value_error((std::string(what) + ": " + std::to_string(have) + " instead of " +
                           std::to_string(want))
                              .c_str());
}

void require_logits(const LogitRows &logits, const RowSampler &sampler) {
    require(logits.shape(1), static_cast<std::size_t>(sampler.vocab_size()), "logits in a row");
    if (logits.shape(0) > 0 && logits.shape(1) > 1) {  // else the stride means nothing
        require(static_cast<std::size_t>(logits.stride(1)), 1, "distance of logits in a row");
    }
}

// What stays the same from step to step while the same rows are asked for, checked once: the position
// comes with each run.
class Parameters {
    template <class Array>
    auto keep(const Array &array) {
        kept_.push_back(std::make_shared<Array>(array));
        return array.data();
    }

  public:
    Parameters(Values<float> temperature, Values<std::int32_t> top_k, Values<float> top_p,
               Values<float> min_p, Values<float> typical_p, Values<float> top_n_sigma,
               Values<float> xtc_probability, Values<float> xtc_threshold,
               Values<float> repetition_penalty, Values<float> presence_penalty,
               Values<float> frequency_penalty, Values<std::uint64_t> seed,
               Values<std::uint32_t> sample_index, Values<std::int32_t> target,
               Values<std::int32_t> num_logprobs, Values<std::int32_t> history_start,
               Values<std::int32_t> history_ids, Values<std::int32_t> history_count,
               Values<std::int32_t> bias_start, Values<std::int32_t> bias_ids,
               Values<float> bias_values, Values<std::int32_t> ban_start,
               Values<std::int32_t> ban_ids, Values<std::int32_t> mask_row,
               Table<std::uint32_t> mask_table) {
        const std::size_t count = temperature.size();
        for (const std::size_t length :
             {top_k.size(), top_p.size(), min_p.size(), typical_p.size(), top_n_sigma.size(),
              xtc_probability.size(), xtc_threshold.size(), repetition_penalty.size(),
              presence_penalty.size(), frequency_penalty.size(), seed.size(), sample_index.size(),
              target.size(), num_logprobs.size(), mask_row.size()})
            require(length, count, "rows");
        for (const std::size_t length : {history_start.size(), bias_start.size(), ban_start.size()})
            require(length, count + 1, "starts of rows");
        require(history_count.size(), history_ids.size(), "history_count");
        require(bias_values.size(), bias_ids.size(), "bias_values");
        rows_ = {static_cast<int>(count), keep(temperature),        keep(top_k),
                 keep(top_p),             keep(min_p),              keep(typical_p),
                 keep(top_n_sigma),       keep(xtc_probability),    keep(xtc_threshold),
                 keep(repetition_penalty), keep(presence_penalty),  keep(frequency_penalty),
                 keep(seed),              keep(sample_index),       nullptr,
                 keep(target),            keep(num_logprobs),       keep(history_start),
                 keep(history_ids),       keep(history_count),      keep(bias_start),
                 keep(bias_ids),          keep(bias_values),        keep(ban_start),
                 keep(ban_ids),           keep(mask_row),           keep(mask_table),
                 mask_table.shape(1)};
    }

    SampleRows at(const std::uint32_t *position) const {
        SampleRows rows = rows_;
        rows.position = position;
        return rows;
    }

  private:
    SampleRows rows_;
    std::vector<std::shared_ptr<void>> kept_;
};

void run(RowSampler &sampler, LogitRows logits, const Parameters &parameters,
         Values<std::uint32_t> position, Answer<std::int32_t> tokens, Answer<float> logprobs,
         Answer<std::int32_t> ranks, AnswerTable<std::int32_t> top_ids,
         AnswerTable<float> top_logprobs) {
    require_logits(logits, sampler);
    const SampleRows rows = parameters.at(position.data());
    const std::size_t count = static_cast<std::size_t>(rows.count);
    for (const std::size_t length : {logits.shape(0), position.size(), tokens.size(), logprobs.size(),
                                     ranks.size(), top_ids.shape(0), top_logprobs.shape(0)})
        require(length, count, "rows");
    require(top_logprobs.shape(1), top_ids.shape(1), "columns of top_logprobs");
    const SampleAnswers answers{tokens.data(),  logprobs.data(),     ranks.data(),
                                top_ids.data(), top_logprobs.data(),
                                static_cast<int>(top_ids.shape(1))};
    nb::gil_scoped_release unlocked;
    sampler.run(logits.data(), logits.stride(0), rows, answers);
}

void log_softmax(RowSampler &sampler, LogitRows logits, AnswerTable<float> out) {
    require_logits(logits, sampler);
    require(out.shape(0), logits.shape(0), "rows of out");
    require(out.shape(1), logits.shape(1), "columns of out");
    nb::gil_scoped_release unlocked;
    sampler.log_softmax(logits.data(), logits.stride(0), static_cast<int>(logits.shape(0)),
                        out.data());
}

}  // namespace

void register_sample(nb::module_ &m) {
    nb::class_<Parameters>(m, "SampleParameters")
        .def(nb::init<Values<float>, Values<std::int32_t>, Values<float>, Values<float>,
                      Values<float>, Values<float>, Values<float>, Values<float>, Values<float>,
                      Values<float>, Values<float>, Values<std::uint64_t>, Values<std::uint32_t>,
                      Values<std::int32_t>, Values<std::int32_t>, Values<std::int32_t>,
                      Values<std::int32_t>, Values<std::int32_t>, Values<std::int32_t>,
                      Values<std::int32_t>, Values<float>, Values<std::int32_t>,
                      Values<std::int32_t>, Values<std::int32_t>, Table<std::uint32_t>>(),
             nb::arg("temperature").noconvert(), nb::arg("top_k").noconvert(),
             nb::arg("top_p").noconvert(), nb::arg("min_p").noconvert(),
             nb::arg("typical_p").noconvert(), nb::arg("top_n_sigma").noconvert(),
             nb::arg("xtc_probability").noconvert(), nb::arg("xtc_threshold").noconvert(),
             nb::arg("repetition_penalty").noconvert(), nb::arg("presence_penalty").noconvert(),
             nb::arg("frequency_penalty").noconvert(), nb::arg("seed").noconvert(),
             nb::arg("sample_index").noconvert(), nb::arg("target").noconvert(),
             nb::arg("num_logprobs").noconvert(), nb::arg("history_start").noconvert(),
             nb::arg("history_ids").noconvert(), nb::arg("history_count").noconvert(),
             nb::arg("bias_start").noconvert(), nb::arg("bias_ids").noconvert(),
             nb::arg("bias_values").noconvert(), nb::arg("ban_start").noconvert(),
             nb::arg("ban_ids").noconvert(), nb::arg("mask_row").noconvert(),
             nb::arg("mask_table").noconvert(),
             "Parameters of rows that last while the same rows are sampled; see SamplingInputs.");
    nb::class_<RowSampler>(m, "RowSampler")
        .def(
            "__init__",
            [](RowSampler *self, int vocab_size, std::shared_ptr<Pool> pool) {
                new (self) RowSampler(vocab_size, std::move(pool));
            },
            nb::arg("vocab_size"), nb::arg("pool"))
        .def("run", &run, nb::arg("logits").noconvert(), nb::arg("parameters"),
             nb::arg("position").noconvert(), nb::arg("tokens").noconvert(),
             nb::arg("logprobs").noconvert(), nb::arg("ranks").noconvert(),
             nb::arg("top_ids").noconvert(), nb::arg("top_logprobs").noconvert(),
             "The sampling program over rows of logits; see kernels/cpu/sampler.py.")
        .def("log_softmax", &log_softmax, nb::arg("logits").noconvert(),
             nb::arg("out").noconvert(), "Natural logprobs of every logit; NaN in rows that fail.");
}

}  // namespace engineroom
