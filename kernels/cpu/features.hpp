// What this processor can run, asked of the processor and the operating system.
#pragma once

#include <vector>

namespace engineroom {

struct CpuFeature {
    const char *name;
    bool usable;  // the processor has it and the operating system saves its registers
};

// The features that a kernel of this project might be chosen by, in a fixed order.
std::vector<CpuFeature> cpu_features();

}  // namespace engineroom
