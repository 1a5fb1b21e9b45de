// A small persistent pool of threads, without OpenMP: torch brings its own, and two of them spin against each other.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>

namespace nybble {

inline constexpr int kMaxThreads = 1024;

// Where the threads of one region wait for each other.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

  private:
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

// Runs body(worker) for worker in [0, threads) at once, the caller being worker 0; returns when all are done. body must not
// throw. False, with nothing run, when the pool is busy with another caller: that one does its work alone.
bool together(int threads, const std::function<void(int worker)>& body);

// Runs task(chunk, worker) for every chunk in [0, chunks), on at most `threads` threads (the caller included); returns
// when all are done. worker is in [0, threads), so that each can own scratch. The task must not throw. Two callers at
// once are safe: the second one does its work alone instead of waiting for the pool.
void parallel(std::size_t chunks, int threads, const std::function<void(std::size_t chunk, int worker)>& task);

}  // namespace nybble
