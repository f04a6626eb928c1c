#include "pool.hpp"

#include <algorithm>
#include <chrono>
#include <utility>

namespace engineroom {
namespace {

// How long a worker spins for the next run() before it sleeps. A step follows the one before it
// within a millisecond while requests run; waking a sleeper takes some 50 us.
constexpr auto kSpin = std::chrono::microseconds(2000);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Spins until done(). After some 100 us it gives the core away between looks: a thread that it waits
// for may have none.
template <class Done>
void spin_until(Done done) {
    for (int i = 1; !done(); ++i) {
        pause();
        if (i > 4096) std::this_thread::yield();
    }
}

}  // namespace

Pool::Pool(int size, std::vector<Core> places)
    : size_(std::max(1, size)), places_(std::move(places)) {
    for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread &thread : threads_) thread.join();
}

void Pool::start(Function function, void *context) {
    if (size_ == 1) {
        function(context, 0);
        return;
    }
    if (places_.empty()) return run_all(function, context);
    const std::vector<int> before = thread_cpus();
    pin_thread(places_[0].cpus);
    run_all(function, context);
    pin_thread(before);
}

void Pool::run_all(Function function, void *context) {
    function_ = function;
    context_ = context;
    running_.store(size_ - 1, std::memory_order_relaxed);
    // Sequentially consistent with the sleeper's own pair: it counts itself asleep, then looks at
    // the generation once more; here the generation moves, then the sleepers are counted.
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (asleep_.load(std::memory_order_seq_cst) > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    function(context, 0);
    spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
}

void Pool::work(int thread) {
    if (!places_.empty()) pin_thread(places_[static_cast<std::size_t>(thread)].cpus);
    std::uint32_t seen = 0;
    for (;;) {
        const auto moved = [&] { return generation_.load(std::memory_order_acquire) != seen; };
        const auto deadline = std::chrono::steady_clock::now() + kSpin;
        for (int i = 1; !moved(); ++i) {
            pause();
            if (i % 256 == 0 && std::chrono::steady_clock::now() > deadline) break;
        }
        if (!moved()) {
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_.fetch_add(1, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
            asleep_.fetch_sub(1, std::memory_order_seq_cst);
        }
        ++seen;  // run() waits for every worker, so the generation is never two ahead
        if (ending_) return;
        function_(context_, thread);
        running_.fetch_sub(1, std::memory_order_acq_rel);
    }
}

void Pool::barrier() {
    if (size_ == 1) return;
    const std::uint32_t epoch = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        epoch_.store(epoch + 1, std::memory_order_release);
    } else {
        spin_until([&] { return epoch_.load(std::memory_order_acquire) != epoch; });
    }
}

}  // namespace engineroom
