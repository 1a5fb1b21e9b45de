#include "threads.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace nybble {
namespace {

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
    void run(std::size_t chunks, int threads, const std::function<void(std::size_t, int)>& task) {
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(workers_) < threads - 1) {
                const int index = static_cast<int>(workers_) + 1;
                std::thread([this, index, seen = round_.load()] { work(index, seen); }).detach();
                ++workers_;
            }
            task_ = &task;
            chunks_ = chunks;
            threads_ = threads;
            next_.store(0, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        take(task, chunks, 0);
        {
            std::lock_guard lock(mutex_);
            task_ = nullptr;  // a worker that wakes only now goes back to sleep: nobody waits for a core that is taken
        }
        // All chunks are handed out, so whoever joined is in its last one: the wait is short, and yields a shared core.
        for (int spins = 0; inside_.load(std::memory_order_acquire) != 0; ++spins) {
            if (spins < kSpins)
                relax();
            else
                std::this_thread::yield();
        }
    }

    std::mutex caller;  // held for the time of one run
    const long owner = process();

  private:
    static constexpr int kSpins = 2000;  // about 50 microseconds: the gap between two matrices of one token

    void take(const std::function<void(std::size_t, int)>& task, std::size_t chunks, int worker) {
        for (std::size_t chunk; (chunk = next_.fetch_add(1, std::memory_order_relaxed)) < chunks;) task(chunk, worker);
    }

    void work(int index, std::uint64_t seen) {
        for (;;) {
            for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) relax();
            const std::function<void(std::size_t, int)>* task;
            std::size_t chunks;
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
                seen = round_.load(std::memory_order_acquire);
                if (index >= threads_ || task_ == nullptr) continue;  // fewer threads wanted, or too late
                task = task_;
                chunks = chunks_;
                inside_.fetch_add(1, std::memory_order_relaxed);
            }
            take(*task, chunks, index);
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<std::uint64_t> round_{0};
    std::atomic<std::size_t> next_{0};
    std::atomic<int> inside_{0};  // workers that have joined the round and not left it
    const std::function<void(std::size_t, int)>* task_ = nullptr;
    std::size_t chunks_ = 0;
    std::size_t workers_ = 0;
    int threads_ = 0;
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

void parallel(std::size_t chunks, int threads, const std::function<void(std::size_t, int)>& task) {
    if (static_cast<std::size_t>(threads) > chunks) threads = static_cast<int>(chunks);
    if (threads > 1) {
        Pool& shared_pool = pool();
        std::unique_lock lock(shared_pool.caller, std::try_to_lock);
        if (lock.owns_lock()) {
            shared_pool.run(chunks, threads, task);
            return;
        }
    }
    for (std::size_t chunk = 0; chunk < chunks; ++chunk) task(chunk, 0);
}

}  // namespace nybble
