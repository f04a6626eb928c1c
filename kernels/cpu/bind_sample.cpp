// What Python calls of the sampler: argument checks, and entries for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

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

void run(RowSampler &sampler, LogitRows logits, Values<float> temperature,
         Values<std::int32_t> top_k, Values<float> top_p, Values<float> min_p,
         Values<float> typical_p, Values<float> top_n_sigma, Values<float> xtc_probability,
         Values<float> xtc_threshold, Values<float> repetition_penalty,
         Values<float> presence_penalty, Values<float> frequency_penalty,
         Values<std::uint64_t> seed, Values<std::uint32_t> sample_index,
         Values<std::uint32_t> position, Values<std::int32_t> target,
         Values<std::int32_t> num_logprobs, Values<std::int32_t> history_start,
         Values<std::int32_t> history_ids, Values<std::int32_t> history_count,
         Values<std::int32_t> bias_start, Values<std::int32_t> bias_ids, Values<float> bias_values,
         Values<std::int32_t> ban_start, Values<std::int32_t> ban_ids,
         Values<std::int32_t> mask_row, Table<std::uint32_t> mask_table,
         Answer<std::int32_t> tokens, Answer<float> logprobs, Answer<std::int32_t> ranks,
         AnswerTable<std::int32_t> top_ids, AnswerTable<float> top_logprobs) {
    require_logits(logits, sampler);
    const std::size_t count = logits.shape(0);
    const std::size_t lengths[] = {
        temperature.size(),        top_k.size(),            top_p.size(),
        min_p.size(),              typical_p.size(),        top_n_sigma.size(),
        xtc_probability.size(),    xtc_threshold.size(),    repetition_penalty.size(),
        presence_penalty.size(),   frequency_penalty.size(), seed.size(),
        sample_index.size(),       position.size(),         target.size(),
        num_logprobs.size(),       mask_row.size(),         tokens.size(),
        logprobs.size(),           ranks.size(),            top_ids.shape(0),
        top_logprobs.shape(0)};
    for (const std::size_t length : lengths) require(length, count, "rows");
    for (const std::size_t length : {history_start.size(), bias_start.size(), ban_start.size()}) {
        require(length, count + 1, "starts of rows");
    }
    require(history_count.size(), history_ids.size(), "history_count");
    require(bias_values.size(), bias_ids.size(), "bias_values");
    require(top_logprobs.shape(1), top_ids.shape(1), "columns of top_logprobs");
    const SampleRows rows{static_cast<int>(count),   temperature.data(),
                          top_k.data(),              top_p.data(),
                          min_p.data(),              typical_p.data(),
                          top_n_sigma.data(),        xtc_probability.data(),
                          xtc_threshold.data(),      repetition_penalty.data(),
                          presence_penalty.data(),   frequency_penalty.data(),
                          seed.data(),               sample_index.data(),
                          position.data(),           target.data(),
                          num_logprobs.data(),       history_start.data(),
                          history_ids.data(),        history_count.data(),
                          bias_start.data(),         bias_ids.data(),
                          bias_values.data(),        ban_start.data(),
                          ban_ids.data(),            mask_row.data(),
                          mask_table.data(),         mask_table.shape(1)};
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
    nb::class_<RowSampler>(m, "RowSampler")
        .def(
            "__init__",
            [](RowSampler *self, int vocab_size, std::shared_ptr<Pool> pool) {
                new (self) RowSampler(vocab_size, std::move(pool));
            },
            nb::arg("vocab_size"), nb::arg("pool"))
        .def("run", &run, nb::arg("logits").noconvert(), nb::arg("temperature").noconvert(),
             nb::arg("top_k").noconvert(), nb::arg("top_p").noconvert(),
             nb::arg("min_p").noconvert(), nb::arg("typical_p").noconvert(),
             nb::arg("top_n_sigma").noconvert(), nb::arg("xtc_probability").noconvert(),
             nb::arg("xtc_threshold").noconvert(), nb::arg("repetition_penalty").noconvert(),
             nb::arg("presence_penalty").noconvert(), nb::arg("frequency_penalty").noconvert(),
             nb::arg("seed").noconvert(), nb::arg("sample_index").noconvert(),
             nb::arg("position").noconvert(), nb::arg("target").noconvert(),
             nb::arg("num_logprobs").noconvert(), nb::arg("history_start").noconvert(),
             nb::arg("history_ids").noconvert(), nb::arg("history_count").noconvert(),
             nb::arg("bias_start").noconvert(), nb::arg("bias_ids").noconvert(),
             nb::arg("bias_values").noconvert(), nb::arg("ban_start").noconvert(),
             nb::arg("ban_ids").noconvert(), nb::arg("mask_row").noconvert(),
             nb::arg("mask_table").noconvert(), nb::arg("tokens").noconvert(),
             nb::arg("logprobs").noconvert(), nb::arg("ranks").noconvert(),
             nb::arg("top_ids").noconvert(), nb::arg("top_logprobs").noconvert(),
             "The sampling program over rows of logits; see kernels/cpu/sampler.py.")
        .def("log_softmax", &log_softmax, nb::arg("logits").noconvert(),
             nb::arg("out").noconvert(), "Natural logprobs of every logit; NaN in rows that fail.");
}

}  // namespace engineroom
