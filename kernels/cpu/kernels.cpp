// Picks the table of kernels that this machine can run.
#include "kernels.hpp"

#include <cstring>
#include <string>
#include <vector>

#include "features.hpp"

namespace engineroom {
namespace {

// A table of this build and what it lacks of cpu_features(), "" where it runs.
struct Compiled {
    const Kernels *table;
    std::string lacks;
};

std::string lacking(const std::vector<std::string> &needs) {
    const std::vector<CpuFeature> found = cpu_features();
    std::string lacks;
    for (const std::string &name : needs) {
        bool usable = false;
        for (const CpuFeature &feature : found) usable |= feature.usable && name == feature.name;
        if (!usable) lacks += (lacks.empty() ? "" : ", ") + name;
    }
    return lacks;
}

#if defined(ENGINEROOM_AMX)
const Kernels &kernels_amx() {
    static const Kernels table = [] {
        Kernels k = kernels_avx512;
        k.name = "amx";
        k.tile = amx::product;
        return k;
    }();
    return table;
}
#endif

std::vector<Compiled> compiled() {
    std::vector<Compiled> tables;
#if defined(__x86_64__)
    std::vector<std::string> needs = {"avx512f",     "avx512bw",    "avx512vl", "avx512dq",
                                      "avx512_vnni", "avx512_bf16", "f16c",     "fma"};
    tables.push_back({&kernels_avx512, lacking(needs)});
#if defined(ENGINEROOM_AMX)
#if !defined(ENGINEROOM_TILE_MODEL)
    needs.insert(needs.end(), {"amx_tile", "amx_int8", "amx_bf16"});
#endif
    tables.insert(tables.begin(), {&kernels_amx(), lacking(needs)});
#endif
    tables.push_back({&kernels_avx2, lacking({"avx2", "fma", "f16c"})});
#elif defined(__aarch64__)
    tables.push_back({&kernels_neon, lacking({"neon", "fp16", "dotprod"})});
#endif
    tables.push_back({&kernels_generic, ""});
    return tables;
}

// The i-th table that runs here, or that does not.
const Compiled *table_at(int i, bool runs) {
    static const std::vector<Compiled> tables = compiled();
    for (const Compiled &one : tables)
        if (one.lacks.empty() == runs && i-- == 0) return &one;
    return nullptr;
}

}  // namespace

const Kernels *usable_kernels(int i) {
    const Compiled *found = table_at(i, true);
    return found == nullptr ? nullptr : found->table;
}

const char *unusable_kernels(int i, const char **lacks) {
    const Compiled *found = table_at(i, false);
    if (found == nullptr) return nullptr;
    *lacks = found->lacks.c_str();
    return found->table->name;
}

const Kernels *find_kernels(const char *name) {
    if (name == nullptr) return usable_kernels(0);
    for (int i = 0; usable_kernels(i) != nullptr; ++i)
        if (std::strcmp(usable_kernels(i)->name, name) == 0) return usable_kernels(i);
    return nullptr;
}

}  // namespace engineroom
