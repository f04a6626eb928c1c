// Threads that run one function together: spinning while work is frequent, asleep when it is not.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "topology.hpp"

namespace engineroom {

// `size` threads, the caller of run() being thread 0. One run() at a time; it may not nest.
// Thread i runs on the core places[i]; the caller only as long as a run() lasts, for threads that
// it starts in between inherit where it may run. Nothing is pinned where `places` is empty.
class Pool {
  public:
    explicit Pool(int size) : Pool(size, place_threads(own_cores(), size)) {}
    Pool(int size, std::vector<Core> places);
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int size() const { return size_; }
    const std::vector<Core> &places() const { return places_; }

    // Calls job(thread) once on every thread and returns when all have. `job` may not throw where
    // it uses barrier(): the others would wait for ever.
    template <class Job>
    void run(Job &&job) {
        start([](void *context, int thread) { (*static_cast<Job *>(context))(thread); }, &job);
    }

    // Inside a run(): returns when every thread has come here. What was written before it is seen
    // by all after it.
    void barrier();

    // Inside a run(): hands out 0, 1, 2, ... once each. Call reset_tickets() on one thread, a
    // barrier before the first take_ticket() and a barrier after the last.
    void reset_tickets() { ticket_.store(0, std::memory_order_relaxed); }
    int take_ticket() { return ticket_.fetch_add(1, std::memory_order_relaxed); }

  private:
    using Function = void (*)(void *, int);
    void start(Function function, void *context);
    void run_all(Function function, void *context);
    void work(int thread);

    const int size_;
    const std::vector<Core> places_;
    std::vector<std::thread> threads_;
    // Each on a cache line of its own: they are written by different threads.
    alignas(64) std::atomic<std::uint32_t> generation_{0};  // one more per run()
    alignas(64) std::atomic<int> running_{0};               // workers still in this run()
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<std::uint32_t> epoch_{0};  // of the barrier
    alignas(64) std::atomic<int> ticket_{0};
    Function function_ = nullptr;
    void *context_ = nullptr;
    bool ending_ = false;
    std::atomic<int> asleep_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Calls job(thread) on `count` threads that live no longer; the caller is thread 0.
template <class Job>
void on_threads(int count, Job job) {
    std::vector<std::thread> others;
    for (int thread = 1; thread < count; ++thread)
        others.emplace_back([&job, thread] { job(thread); });
    job(0);
    for (std::thread &other : others) other.join();
}

}  // namespace engineroom
