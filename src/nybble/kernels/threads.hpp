// A small persistent pool of threads. Source: our own; the caller is always one of the workers.
#pragma once

#include <cstddef>
#include <functional>

namespace nybble {

// Runs task(chunk, worker) for every chunk in [0, chunks), on at most `threads` threads (the caller included); returns
// when all are done. worker is in [0, threads), so that each can own scratch. The task must not throw. Two callers at
// once are safe: the second one does its work alone instead of waiting for the pool.
void parallel(std::size_t chunks, int threads, const std::function<void(std::size_t chunk, int worker)>& task);

inline constexpr int kMaxThreads = 1024;

}  // namespace nybble
