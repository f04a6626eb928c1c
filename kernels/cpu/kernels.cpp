// Picks the table of kernels that this machine can run.
#include "kernels.hpp"

#include <cstring>
#include <string>
#include <vector>

#include "features.hpp"

namespace engineroom {
namespace {

bool has(const std::vector<std::string> &wanted) {
    const std::vector<CpuFeature> found = cpu_features();
    for (const std::string &name : wanted) {
        bool usable = false;
        for (const CpuFeature &feature : found) usable |= feature.usable && name == feature.name;
        if (!usable) return false;
    }
    return true;
}

std::vector<const Kernels *> usable() {
    std::vector<const Kernels *> tables;
#if defined(__x86_64__)
    if (has({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "f16c",
             "fma"}))
        tables.push_back(&kernels_avx512);
    if (has({"avx2", "fma", "f16c"})) tables.push_back(&kernels_avx2);
#elif defined(__aarch64__)
    if (has({"neon", "fp16", "dotprod"})) tables.push_back(&kernels_neon);
#endif
    tables.push_back(&kernels_generic);
    return tables;
}

}  // namespace

const Kernels *usable_kernels(int i) {
    static const std::vector<const Kernels *> tables = usable();
    return i >= 0 && i < static_cast<int>(tables.size()) ? tables[static_cast<std::size_t>(i)]
                                                         : nullptr;
}

const Kernels *find_kernels(const char *name) {
    if (name == nullptr) return usable_kernels(0);
    for (int i = 0; usable_kernels(i) != nullptr; ++i)
        if (std::strcmp(usable_kernels(i)->name, name) == 0) return usable_kernels(i);
    return nullptr;
}

}  // namespace engineroom
