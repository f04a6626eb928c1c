// A program that holds every table of kernels which this machine can run to plain double precision.
//
// It needs neither Python nor nanobind, so that it also runs where neither does: under an emulator
// of another processor, cross-compiled, or under a sanitizer (tests/kernels/test_cpu_machines.py).
// It prints the tables, then one line a check, and exits with 1 if any failed. Names given as
// arguments choose checks: `selftest pool linear`.
//
// A subject has a file of its own, selftest_*.cpp.
#include "selftest.hpp"

#include <cstdio>
#include <cstring>

using namespace engineroom;
using namespace engineroom::selftest;

int main(int argc, char **argv) {
    const auto wanted = [&](const char *name) {
        for (int i = 1; i < argc; ++i)
            if (std::strcmp(argv[i], name) == 0) return true;
        return argc == 1;
    };
    std::printf("tables:");
    for (int i = 0; usable_kernels(i) != nullptr; ++i) std::printf(" %s", usable_kernels(i)->name);
    std::printf("\n");
    if (find_kernels(nullptr) != usable_kernels(0) || find_kernels("no such table") != nullptr) {
        std::printf("find_kernels FAILED\n");
        ++failures;
    }
    for (int i = 0; usable_kernels(i) != nullptr; ++i) {
        const Kernels &k = *usable_kernels(i);
        if (wanted("rows")) check_rows(k);
        if (wanted("tiles")) check_tiles(k);
        if (wanted("compact")) check_compact(k);
        if (wanted("numbers")) {  // generic, the last table, rounds its multiply-adds twice
            const bool has_peer = usable_kernels(i + 1) != nullptr && usable_kernels(i + 2) != nullptr;
            check_numbers_of_rows(k, has_peer ? *usable_kernels(i + 1) : k);
        }
        if (wanted("linear")) check_linear(k);
        if (wanted("attention")) check_attention(k);
    }
    if (wanted("sampler")) check_sampler();
    if (wanted("pool")) check_pool();
    std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
    return failures ? 1 : 0;
}
