// The native module's entry points.
#include <nanobind/nanobind.h>
NB_MODULE(_native, m) { m.def("answer", []() { return 42; }); }
