// Which cores this process may use, which memory node each is of, and where a pool's threads belong.
#pragma once

#include <string>
#include <vector>

namespace engineroom {

// A physical core: its hardware threads that this process may use, and its memory (NUMA) node.
struct Core {
    int node;
    std::vector<int> cpus;  // ascending
};

// The cores of the CPUs `allowed` (ascending), by node, then by CPU, as the folder `sys` (/sys)
// tells. What it does not tell: a CPU is a core by itself and of node 0. Nodes without an allowed CPU
// (memory alone, or outside of the cpuset) have no core and so do not count.
std::vector<Core> find_cores(const std::string &sys, const std::vector<int> &allowed);

// The core of each of `threads` threads: spread evenly over `cores` in their order, so that each node
// has a contiguous range of the threads, and no core two while another has none. Empty, for nothing is
// to be gained, where all cores are of one node or there is one thread.
std::vector<Core> place_threads(const std::vector<Core> &cores, int threads);

// CPUs that the calling thread may run on, ascending; empty where the system does not say.
std::vector<int> thread_cpus();

// Lets the calling thread run on these CPUs alone. A wish: where it is refused nothing changes.
void pin_thread(const std::vector<int> &cpus);

// Cores of this process: those of the calling thread's CPUs.
std::vector<Core> own_cores();

// How many threads are of use: own cores, within the cgroup's quota.
int usable_cores();

}  // namespace engineroom
