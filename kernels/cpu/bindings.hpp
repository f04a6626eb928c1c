// What each file adds to the native module.
#pragma once

#include <nanobind/nanobind.h>

namespace engineroom {

void register_counter(nanobind::module_ &m);
void register_quantise(nanobind::module_ &m);
void register_pack(nanobind::module_ &m);
void register_packed_file(nanobind::module_ &m);
void register_probe(nanobind::module_ &m);
void register_linear(nanobind::module_ &m);
void register_attention(nanobind::module_ &m);
void register_sample(nanobind::module_ &m);
void register_step(nanobind::module_ &m);

}  // namespace engineroom
