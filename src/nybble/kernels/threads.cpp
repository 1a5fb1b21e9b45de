#include "threads.hpp"

#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace nybble {
namespace {

// Waiting spins for some 30 to 100 microseconds, the gap between two operations or tokens, and then sleeps: a thread that spins
// on a busy machine keeps the very thread it waits for from running.
constexpr int kSpins = 3000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A fork copies the memory but not the threads; the process number tells that a pool is dead.
long process() {
#if defined(__unix__) || defined(__APPLE__)
    return static_cast<long>(getpid());
#else
    return 0;
#endif
}

class Pool {
  public:
    void run(int threads, const std::function<void(int)>& body) {
        while (workers_ < threads - 1) {
            const int index = ++workers_;
            std::thread([this, index, seen = round_.load(std::memory_order_relaxed)] { work(index, seen); }).detach();
        }
        body_ = &body;
        wanted_.store(threads, std::memory_order_relaxed);
        busy_.store(workers_, std::memory_order_relaxed);  // all of them report back, wanted or not
        round_.fetch_add(1, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst) != 0) round_.notify_all();
        body(0);
        int spins = 0;
        for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) {
            if (++spins < kSpins)
                relax();
            else
                busy_.wait(busy, std::memory_order_acquire);
        }
    }

    std::mutex caller;  // held for the time of one run
    const long owner = process();

  private:
    void work(int index, std::uint32_t seen) {
        for (;;) {
            for (int spins = 0; round_.load(std::memory_order_acquire) == seen; ++spins) {
                if (spins < kSpins) {
                    relax();
                    continue;
                }
                asleep_.fetch_add(1, std::memory_order_seq_cst);
                round_.wait(seen, std::memory_order_seq_cst);
                asleep_.fetch_sub(1, std::memory_order_relaxed);
            }
            seen = round_.load(std::memory_order_acquire);  // no further: the next round waits until this one is done
            if (index < wanted_.load(std::memory_order_relaxed)) (*body_)(index);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
        }
    }

    alignas(64) std::atomic<std::uint32_t> round_{0};
    alignas(64) std::atomic<int> busy_{0};
    std::atomic<int> asleep_{0};
    std::atomic<int> wanted_{0};
    const std::function<void(int)>* body_ = nullptr;
    int workers_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and a destructor at exit would race with them.
std::atomic<Pool*> shared{nullptr};

Pool& pool() {
    Pool* now = shared.load();
    while (now == nullptr || now->owner != process()) {
        auto* made = new Pool;
        if (shared.compare_exchange_strong(now, made)) return *made;
        delete made;
    }
    return *now;
}

}  // namespace

void Barrier::wait() {
    if (threads_ == 1) return;
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        round_.notify_all();
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (spins < kSpins)
            relax();
        else
            round_.wait(round, std::memory_order_acquire);
    }
}

bool together(int threads, const std::function<void(int)>& body) {
    if (threads <= 1) {
        body(0);
        return true;
    }
    Pool& all = pool();
    std::unique_lock lock(all.caller, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    all.run(threads, body);
    return true;
}

void parallel(std::size_t chunks, int threads, const std::function<void(std::size_t, int)>& task) {
    if (static_cast<std::size_t>(threads) > chunks) threads = static_cast<int>(chunks);
    std::atomic<std::size_t> next{0};
    const auto take = [&](int worker) {
        for (std::size_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) task(chunk, worker);
    };
    if (threads > 1 && together(threads, take)) return;
    take(0);
}

}  // namespace nybble
