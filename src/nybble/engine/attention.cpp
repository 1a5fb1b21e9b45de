// Attention over the cache: keys and values go in, then every thread meets heads with blocks of queries.
#include "engine.hpp"
#include "state.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace nybble {
namespace {

constexpr std::size_t kTurned = 64; // queries for which a head's cache is turned into floats once

}  // namespace

// Norm, rotation and caching of one row's key-value head and its query heads.
void Engine::store(const Attention& op, const State& state, std::size_t row, std::size_t head_index, float* scratch) {
    Rows& rows = buffers_[std::size_t(Buffer::projected)];
    float* base = rows.values.as<float>() + row * rows.stride;
    const std::size_t group = op.heads / op.shared, n = op.dimensions;
    float* key = base + (op.heads + head_index) * n;
    const float* value = base + (op.heads + op.shared + head_index) * n;
    const auto prepare = [&](float* v, const std::vector<float>& gain) {
        if (!gain.empty()) state.run.norm_row(v, n, {false, op.norm_eps, gain.data(), nullptr}, v);
        if (op.rotary == 0) return;
        const std::size_t half = op.rotary / 2, step = op.interleaved ? 2 : 1, apart = op.interleaved ? 1 : half;
        const float* turn = turns_[op.rotation].as<float>() + row * half * 2;
        for (std::size_t i = 0; i < half; ++i) {
            const float c = turn[2 * i], s = turn[2 * i + 1], a = v[i * step], b = v[i * step + apart];
            v[i * step] = a * c - b * s;
            v[i * step + apart] = b * c + a * s;
        }
    };
    for (std::size_t q = 0; q < group; ++q) prepare(base + (head_index * group + q) * n, op.query_gain);
    prepare(key, op.key_gain);
    const CacheHead to = head(op, std::size_t(state.step.sequences[row]), head_index);
    const std::size_t depth = to.shape->depth;
    if (depth != n) {
        std::memset(scratch, 0, 2 * depth * sizeof(float));
        std::copy_n(key, n, scratch);
        std::copy_n(value, n, scratch + depth);
        key = scratch;
        value = scratch + depth;
    }
    state.run.append(to, std::size_t(state.step.positions[row]), key, value);
}

void Engine::attention(const Attention& op, std::size_t index, State& state, int worker) {
    auto* scratch = workers_[std::size_t(worker)].scratch.as<float>();
    const Rows& from = buffers_[std::size_t(Buffer::projected)];
    const Rows& to = buffers_[std::size_t(Buffer::mixed)];
    const std::size_t group = op.heads / op.shared;
    const bool alone = state.rows == 1;
    const auto [first_head, last_head] = share(op.shared, worker, threads_);
    if (alone) {  // the heads of a thread need nothing of the other threads
        for (std::size_t h = first_head; h < last_head; ++h) store(op, state, 0, h, scratch);
    } else {
        const auto [first, last] = share(state.rows * op.shared, worker, threads_);
        for (std::size_t i = first; i < last; ++i) store(op, state, i / op.shared, i % op.shared, scratch);
        barrier_.wait();
    }
    // Rows of one text that follow each other meet the cache together.
    const std::size_t together = std::max<std::size_t>(1, kTurned / group);
    // Behind the last attention only the wanted rows go on.
    const bool last_layer = op.layer + 1 == shapes_.size();
    const auto wanted = [&](std::size_t row) {
        const std::int64_t* end = state.step.wanted + state.step.wanted_count;
        return !last_layer || std::binary_search(state.step.wanted, end, std::int64_t(row));
    };
    const auto meet = [&](std::size_t h, std::size_t row, std::size_t rows) {
        while (rows != 0 && !wanted(row)) ++row, --rows;
        while (rows != 0 && !wanted(row + rows - 1)) --rows;
        if (rows == 0) return;
        const auto seen_first = [&](std::size_t position) { return op.window != 0 && position + 1 > op.window ? position + 1 - op.window : 0; };
        const auto begin = static_cast<std::size_t>(state.step.positions[row]), end = begin + rows;
        Attend a;
        a.cache = head(op, std::size_t(state.step.sequences[row]), h);
        CacheShape floats = *a.cache.shape;
        if (rows * group > kQueries && floats.widens()) {
            floats.type = CacheType::f32;
            const CacheHead turned = {&floats, workers_[std::size_t(worker)].head.as()};
            state.run.widen_head(a.cache, seen_first(begin) / 16 * 16, end, turned);
            a.cache = turned;
        }
        a.dimensions = op.dimensions;
        a.scale = op.scale;
        a.cap = op.cap;
        a.count = 0;
        for (std::size_t r = row; r < row + rows; ++r)
            for (std::size_t q = 0; q < group; ++q) {
                const std::size_t position = begin + (r - row);
                a.queries[a.count] = from.values.as<float>() + r * from.stride + (h * group + q) * op.dimensions;
                a.out[a.count] = to.values.as<float>() + r * to.stride + (h * group + q) * op.dimensions;
                a.first[a.count] = seen_first(position);
                a.last[a.count] = position + 1;
                if (++a.count == kQueries || (r + 1 == row + rows && q + 1 == group)) {
                    state.run.attend(a, scratch);
                    a.count = 0;
                }
            }
    };
    if (alone) {
        for (std::size_t h = first_head; h < last_head; ++h) meet(h, 0, 1);
    } else {
        // Chunk c is head c % shared of the block of rows c / shared; every thread counts the blocks for itself.
        std::size_t block = 0, row = 0, length = 0;
        const auto next = [&] {  // the block that begins at `row`
            length = 1;
            while (length < together && row + length < state.rows &&
                   state.step.sequences[row + length] == state.step.sequences[row] &&
                   state.step.positions[row + length] == state.step.positions[row] + std::int64_t(length))
                ++length;
        };
        next();
        for (;;) {
            const std::size_t c = taken_[index].fetch_add(1, std::memory_order_relaxed);
            while (block < c / op.shared && row < state.rows) {
                row += length;
                ++block;
                if (row < state.rows) next();
            }
            if (row >= state.rows) break;
            meet(c % op.shared, row, length);
        }
    }
    barrier_.wait();
}

}  // namespace nybble
