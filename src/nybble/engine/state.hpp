// What the operations of a run share; private to the engine's sources.
#pragma once

#include "engine.hpp"

#include <utility>

namespace nybble {

// The share of `count` pieces that belongs to a worker: [first, last).
inline std::pair<std::size_t, std::size_t> share(std::size_t count, int worker, int threads) {
    const auto w = static_cast<std::size_t>(worker), n = static_cast<std::size_t>(threads);
    return {count * w / n, count * (w + 1) / n};
}

struct Engine::State {
    const Step& step;
    const Kernels& run;
    std::size_t rows;  // now
    bool own;          // few rows: activations are each thread's own
};

}  // namespace nybble
