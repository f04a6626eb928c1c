// Reads Linux's /sys; elsewhere, and where it is absent, all cores are alike.
#include "topology.hpp"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <fstream>
#include <map>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace engineroom {
namespace {

// Empty where there is no such file.
std::string first_line(const std::string &path) {
    std::string line;
    std::ifstream file(path);
    std::getline(file, line);
    return line;
}

// "0-2,8" is 0 1 2 8. What follows something else is left out.
std::vector<int> numbers_of(const std::string &list) {
    std::vector<int> numbers;
    const char *at = list.c_str();
    int first = 0, last = 0, length = 0;
    while (std::sscanf(at, "%d%n", &first, &length) == 1) {
        at += length;
        last = first;
        if (std::sscanf(at, "-%d%n", &last, &length) == 1) at += length;
        for (int i = first; i <= last; ++i) numbers.push_back(i);
        if (*at++ != ',') break;
    }
    return numbers;
}

// Cores' worth of time that the cgroup allows, or a large number.
int quota() {
    long long limit = 0, period = 0;
    if (std::sscanf(first_line("/sys/fs/cgroup/cpu.max").c_str(), "%lld %lld", &limit, &period) != 2) {
        std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lld", &limit);
        std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lld", &period);
    }
    if (limit <= 0 || period <= 0) return INT_MAX;
    return static_cast<int>(std::max(1LL, (limit + period - 1) / period));
}

}  // namespace

std::vector<Core> find_cores(const std::string &sys, const std::vector<int> &allowed) {
    const std::string system = sys + "/devices/system/";
    std::map<int, int> node_of;  // by CPU
    for (int node : numbers_of(first_line(system + "node/online")))
        for (int cpu : numbers_of(first_line(system + "node/node" + std::to_string(node) + "/cpulist")))
            node_of[cpu] = node;
    std::map<std::string, Core> by_siblings;  // hardware threads of one core list the same siblings
    for (int cpu : allowed) {
        const std::string siblings = first_line(system + "cpu/cpu" + std::to_string(cpu) +
                                                "/topology/thread_siblings_list");
        Core &core = by_siblings[siblings.empty() ? std::to_string(cpu) : siblings];
        if (core.cpus.empty()) core.node = node_of.count(cpu) ? node_of[cpu] : 0;
        core.cpus.push_back(cpu);
    }
    std::vector<Core> cores;
    for (auto &entry : by_siblings) cores.push_back(std::move(entry.second));
    std::sort(cores.begin(), cores.end(), [](const Core &a, const Core &b) {
        return a.node != b.node ? a.node < b.node : a.cpus[0] < b.cpus[0];
    });
    return cores;
}

std::vector<Core> place_threads(const std::vector<Core> &cores, int threads) {
    std::vector<Core> places;
    if (threads < 2 || cores.empty() || cores.front().node == cores.back().node) return places;
    const std::size_t count = static_cast<std::size_t>(threads);
    for (std::size_t i = 0; i < count; ++i) places.push_back(cores[i * cores.size() / count]);
    return places;
}

#if defined(__linux__)
std::vector<int> thread_cpus() {
    std::vector<int> cpus;
    cpu_set_t mask;
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return cpus;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
    return cpus;
}

void pin_thread(const std::vector<int> &cpus) {
    cpu_set_t mask;
    CPU_ZERO(&mask);
    for (int cpu : cpus) CPU_SET(cpu, &mask);
    sched_setaffinity(0, sizeof mask, &mask);
}
#else
std::vector<int> thread_cpus() { return {}; }
void pin_thread(const std::vector<int> &) {}
#endif

std::vector<Core> own_cores() { return find_cores("/sys", thread_cpus()); }

int usable_cores() {
    const int cores = static_cast<int>(own_cores().size());
    return std::clamp(cores > 0 ? cores : static_cast<int>(std::thread::hardware_concurrency()), 1,
                      quota());
}

}  // namespace engineroom
