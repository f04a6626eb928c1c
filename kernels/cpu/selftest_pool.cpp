// Self-test of the pool of threads: barriers, tickets, sleep and waking.
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"
#include "selftest.hpp"

namespace engineroom {
namespace selftest {

void check_pool() {
    for (int size = 1; size <= 4; ++size) {
        Check check("-", "pool of " + std::to_string(size));
        Pool pool(size);
        check.same(pool.size(), size, "size", 0);
        std::vector<int> seen(size), before(size), wrong(size, 0);
        std::atomic<int> calls{0};
        const auto run = [&](int round) {
            pool.run([&](int thread) {  // plain memory: a sanitizer sees what is not ordered
                calls.fetch_add(1, std::memory_order_relaxed);
                for (int phase = 0; phase < 3; ++phase) {
                    seen[thread] = 3 * round + phase;
                    pool.barrier();
                    for (int other = 0; other < size; ++other)
                        wrong[thread] += seen[other] != 3 * round + phase;
                    pool.barrier();
                }
                before[thread] = round;
            });
            for (int thread = 0; thread < size; ++thread) {
                check.same(before[thread], round, "thread", thread);
                check.same(wrong[thread], 0, "seen by", thread);
            }
        };
        int rounds = 0;
        while (rounds < (size <= 2 ? 200 : 50)) run(rounds++);  // slow where cores are fewer
        for (int i = 0; i < 12; ++i) {  // workers go to sleep after 2 ms; some wake at that moment
            std::this_thread::sleep_for(std::chrono::microseconds(1800 + 100 * i));
            run(rounds++);
        }
        check.same(calls.load(), rounds * size, "calls", 0);

        std::vector<int> taken(1000, 0);
        pool.run([&](int thread) {
            if (thread == 0) pool.reset_tickets();
            pool.barrier();
            for (int i = pool.take_ticket(); i < 1000; i = pool.take_ticket()) ++taken[i];
            pool.barrier();
        });
        for (int i = 0; i < 1000; ++i) check.same(taken[i], 1, "ticket", i);
        for (int i = 0; i < 20; ++i) {
            Pool brief(size);  // ends while its workers begin
            if (i % 2) brief.run([](int) {});
        }
    }
    Check check("-", "usable_cores");
    check.truth(usable_cores() >= 1, "cores");
}

}  // namespace selftest
}  // namespace engineroom
