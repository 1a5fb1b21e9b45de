#include "engine.hpp"
#include "state.hpp"

#include "../kernels/cpu.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace nybble {
namespace {

constexpr std::size_t kOwn = 8;     // rows up to which every thread prepares its own activations: one panel, which threads
                                    // that write it together would take out of each other's caches
constexpr std::size_t kMany = 32;   // rows from which a tile is long work

std::size_t up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }

// Tiles are handed out in pieces: one large piece for each thread, then small ones, so that a thread that was held up
// leaves its share to the others. Many rows make every tile long work: small pieces of equal size do.
constexpr std::size_t kSmall = 4;    // small pieces a thread
constexpr std::size_t kPieces = 48;  // pieces a thread where every tile is long work

std::size_t piece_count(int threads, std::size_t rows) {
    if (threads == 1) return 1;
    return std::size_t(threads) * (rows < kMany ? 1 + kSmall : kPieces);
}

std::pair<std::size_t, std::size_t> piece(std::size_t tiles, std::size_t at, int threads, std::size_t rows) {
    const std::size_t count = piece_count(threads, rows), n = static_cast<std::size_t>(threads);
    if (threads == 1) return {0, tiles};
    if (rows >= kMany) {  // in pairs, which the kernels take together
        const std::size_t pairs = (tiles + 1) / 2;
        return {2 * (pairs * at / count), std::min(tiles, 2 * (pairs * (at + 1) / count))};
    }
    const std::size_t large = tiles * 3 / 4;  // of all threads together
    if (at < n) return {large * at / n, large * (at + 1) / n};
    const std::size_t rest = tiles - large, small = kSmall * n;
    return {large + rest * (at - n) / small, large + rest * (at - n + 1) / small};
}

bool quantizes(const Linear& op, bool exact) {
    if (exact) return false;
    return std::any_of(op.parts.begin(), op.parts.end(), [](const Part& p) { return p.weight->tiled.holds == Holds::codes; });
}

// Rows [first, last) of x; where codes lie in panels, `first` begins one and there are enough of them to lie so.
Activations some_rows(const Activations& x, std::size_t first, std::size_t last) {
    return {last - first,
            x.stride,
            x.values + first * x.stride,
            x.codes + first * x.stride,
            x.scale + first * (x.stride / kBlock),
            x.sums + first * (x.stride / 16)};
}

// The rows that some_rows may be asked for so that all that are wanted are among them. None where nothing is wanted.
std::pair<std::size_t, std::size_t> wanted_rows(const Step& step, std::size_t rows) {
    if (step.wanted_count == 0) return {0, 0};
    if (!in_panels(rows)) return {0, rows};
    std::size_t first = std::size_t(step.wanted[0]) / kPanel * kPanel;
    const std::size_t last = std::min(rows, up(std::size_t(step.wanted[step.wanted_count - 1]) + 1, kPanel));
    if (!in_panels(last - first) && first != 0) first -= kPanel;
    return {first, last};
}

}  // namespace

Engine::Engine(int threads, bool exact, CacheType cache)
    : threads_(threads), exact_(exact), cache_type_(cache), workers_(std::size_t(threads)), barrier_(threads) {}

std::size_t Engine::rotation(std::vector<float> frequencies) {
    for (std::size_t i = 0; i < frequencies_.size(); ++i)
        if (frequencies_[i] == frequencies) return i;
    frequencies_.push_back(std::move(frequencies));
    return frequencies_.size() - 1;
}

void Engine::append(Op op) { program_.push_back(std::move(op)); }

void Engine::Rows::allocate(std::size_t rows, std::size_t columns, bool quantized) {
    this->columns = columns;
    stride = (columns + kBlock - 1) / kBlock * kBlock;
    if (stride / kBlock % 2 == 0) stride += kBlock;  // rows in one column would share few lines of the nearest cache
    values = Memory(rows * stride * sizeof(float) + 64);
    if (!quantized) return;
    rows = up(rows, kPanel);
    codes = Memory(rows * stride + 64);
    scale = Memory(rows * stride / kBlock * sizeof(float) + 64);
    sums = Memory(rows * stride / 16 * sizeof(std::int32_t) + 64);
}

void Engine::Rows::quantize(const Kernels& run, const float* row, std::size_t columns, std::size_t rows, std::size_t m) const {
    run.quantize_row(row, columns, {codes.as<std::int8_t>(), scale.as<float>(), sums.as<std::int32_t>(), stride, rows, m});
}

Activations Engine::Rows::view(std::size_t rows) const {
    return {rows, stride, values.as<float>(), codes.as<std::int8_t>(), scale.as<float>(), sums.as<std::int32_t>()};
}

void Engine::finish(std::size_t vocabulary, std::size_t rows) {
    vocabulary_ = vocabulary;
    most_ = rows;
    std::size_t widths[kBuffers] = {};
    std::size_t scratch = 0, widest = 0, layers = 0;
    Linear* projection = nullptr;  // before the attention that is looked at
    const Attention* last = nullptr;
    Linear* of_last = nullptr;
    const auto wide = [&](Buffer b, std::size_t columns) {
        auto& width = widths[static_cast<std::size_t>(b)];
        width = std::max(width, columns);
    };
    for (Op& op : program_) {
        if (op.kind == Op::Kind::embed) wide(Buffer::residual, op.embed.tokens->tiled.columns);
        if (op.kind == Op::Kind::norm) wide(op.norm.to, widths[std::size_t(op.norm.from)]);
        if (op.kind == Op::Kind::linear)
            for (Part& part : op.linear.parts) {
                const Tiled& w = part.weight->tiled;
                part.last = w.tiles;
                if (op.linear.to != Buffer::logits) wide(op.linear.to, part.column + w.rows);
                wide(op.linear.from, w.columns);
                widest = std::max(widest, w.columns);
                scratch = std::max(scratch, product_scratch(w, most_));
            }
        if (op.kind == Op::Kind::linear && op.linear.to == Buffer::projected) projection = &op.linear;
        if (op.kind == Op::Kind::attention) {
            const Attention& a = op.attention;
            last = &a;
            of_last = projection;
            wide(Buffer::mixed, a.heads * a.dimensions);
            layers = std::max(layers, a.layer + 1);
        }
    }
    for (std::size_t b = 0; b + 1 < kBuffers; ++b) buffers_[b].allocate(most_, widths[b], true);
    for (Worker& worker : workers_) {
        worker.normed.allocate(kOwn, widths[std::size_t(Buffer::normed)], true);
        worker.source.allocate(kOwn, widest, true);
        worker.scratch = Memory(scratch + 64);
    }
    for (const auto& f : frequencies_) turns_.emplace_back(most_ * f.size() * 2 * sizeof(float) + 64);
    taken_ = std::make_unique<std::atomic<std::size_t>[]>(program_.size());
    shapes_.resize(layers);
    if (of_last != nullptr) set_queries_apart(*last, *of_last);
}

// Behind the last attention only the wanted rows go on, so that the others need no queries there. They are the first columns.
void Engine::set_queries_apart(const Attention& op, Linear& projection) const {
    const std::size_t queries = op.heads * op.dimensions;
    std::vector<Part> parts;
    for (Part part : projection.parts) {
        const std::size_t rows = part.weight->tiled.rows;
        part.wanted_only = part.column + rows <= queries;
        if (part.column == 0 && rows > queries && queries % kRows == 0) {  // queries, keys and values in one matrix
            Part rest = part;
            part.wanted_only = true;
            part.last = rest.first = queries / kRows;
            parts.push_back(std::move(part));
            parts.push_back(std::move(rest));
        } else {
            parts.push_back(std::move(part));
        }
    }
    projection.parts = std::move(parts);
}

void Engine::reserve(std::size_t sequences, std::size_t positions) {
    caches_.clear();
    capacity_ = up(positions, 16);
    sequences_ = sequences;
    std::size_t scratch = 0, floats = 0;
    for (const Op& op : program_)
        if (op.kind == Op::Kind::attention) {
            const Attention& a = op.attention;
            CacheShape& s = shapes_[a.layer];
            s.type = cache_type_;
            s.capacity = capacity_;
            s.depth = up(a.dimensions, cache_type_ == CacheType::int4 ? 32 : 16);
            const std::size_t copies = 2 * s.depth * sizeof(float);  // a key and a value, filled up
            scratch = std::max(scratch, copies + kernels().attend_scratch(s.depth, capacity_));
            if (s.widens()) floats = std::max(floats, CacheShape{CacheType::f32, capacity_, s.depth}.head_bytes());
        }
    for (Worker& worker : workers_) {
        if (worker.scratch.bytes() < scratch + 64) worker.scratch = Memory(scratch + 64);
        worker.head = Memory(floats);  // takes no memory before the first prompt
    }
    caches_.resize(shapes_.size());
    for (const Op& op : program_)
        if (op.kind == Op::Kind::attention)
            for (std::size_t s = 0; s < sequences; ++s)
                caches_[op.attention.layer].emplace_back(op.attention.shared * shapes_[op.attention.layer].head_bytes());
}

std::size_t Engine::cache_bytes() const { return position_bytes() * capacity_ * sequences_; }

std::size_t Engine::position_bytes() const {
    std::size_t total = 0;
    for (const Op& op : program_)
        if (op.kind == Op::Kind::attention && op.attention.layer < shapes_.size()) {
            const CacheShape& s = shapes_[op.attention.layer];
            if (s.capacity != 0) total += op.attention.shared * s.head_bytes() / s.capacity;
        }
    return total;
}

CacheHead Engine::head(const Attention& op, std::size_t sequence, std::size_t head) const {
    const CacheShape& shape = shapes_[op.layer];
    return {&shape, caches_[op.layer][sequence].as() + head * shape.head_bytes()};
}

void Engine::run(const Step& step) {
    for (std::size_t i = 0; i < program_.size(); ++i) taken_[i].store(0, std::memory_order_relaxed);
    State states[1] = {{step, kernels(), step.rows, step.rows <= kOwn}};
    std::vector<State> all(std::size_t(threads_), states[0]);  // every thread follows the rows for itself
    const auto body = [&](int worker) { work(worker, all[std::size_t(worker)]); };
    while (!together(threads_, body)) {
    }
}

void Engine::work(int worker, State& state) {
    for (std::size_t i = 0; i < program_.size(); ++i) {
        const Op& op = program_[i];
        switch (op.kind) {
            case Op::Kind::embed:
                embed(op.embed, state, worker);
                break;
            case Op::Kind::norm:
                norm(op.norm, state, worker);
                break;
            case Op::Kind::linear:
                linear(op.linear, i, state, worker);
                break;
            case Op::Kind::attention:
                attention(op.attention, i, state, worker);
                break;
            case Op::Kind::add: {
                Rows& from = buffers_[std::size_t(op.add.from)];
                Rows& to = buffers_[std::size_t(op.add.to)];
                const std::size_t columns = std::min(from.columns, to.columns);
                const auto [first, last] = share(columns, worker, threads_);
                for (std::size_t m = 0; m < state.rows; ++m)
                    for (std::size_t k = first; k < last; ++k)
                        to.values.as<float>()[m * to.stride + k] += from.values.as<float>()[m * from.stride + k];
                barrier_.wait();
                break;
            }
            case Op::Kind::select: {
                if (worker == 0 && state.step.wanted_count != state.rows)
                    for (const Buffer b : {Buffer::residual, Buffer::mixed}) {
                        Rows& x = buffers_[std::size_t(b)];
                        for (std::size_t i = 0; i < state.step.wanted_count; ++i)
                            std::memmove(x.values.as<float>() + i * x.stride,
                                         x.values.as<float>() + std::size_t(state.step.wanted[i]) * x.stride,
                                         x.stride * sizeof(float));
                    }
                if (state.step.wanted_count != state.rows) barrier_.wait();
                state.rows = state.step.wanted_count;
                state.own = state.rows <= kOwn;
                break;
            }
            case Op::Kind::cap: {
                const auto [first, last] = share(state.rows * vocabulary_, worker, threads_);
                for (std::size_t k = first; k < last; ++k)
                    state.step.logits[k] = op.cap.cap * std::tanh(state.step.logits[k] / op.cap.cap);
                barrier_.wait();
                break;
            }
        }
        if (state.rows == 0) return;  // no logits wanted: the cache is filled
    }
}

void Engine::embed(const Embed& op, State& state, int worker) {
    Rows& x = buffers_[std::size_t(Buffer::residual)];
    const std::size_t width = op.tokens->tiled.columns;
    const auto [first, last] = share(state.rows, worker, threads_);
    std::vector<float> place(op.positions ? width : 0);
    for (std::size_t m = first; m < last; ++m) {
        float* row = x.values.as<float>() + m * x.stride;
        state.run.tiled_row(op.tokens->tiled, static_cast<std::size_t>(state.step.tokens[m]), row);
        if (op.scale != 1.0f)
            for (std::size_t k = 0; k < width; ++k) row[k] *= op.scale;
        if (op.positions) {
            state.run.tiled_row(op.positions->tiled, static_cast<std::size_t>(state.step.positions[m] + op.position_offset),
                                place.data());
            for (std::size_t k = 0; k < width; ++k) row[k] += place[k];
        }
        for (std::size_t f = 0; f < frequencies_.size(); ++f) {
            float* turn = turns_[f].as<float>() + m * frequencies_[f].size() * 2;
            for (const float frequency : frequencies_[f]) {  // the angle in float32, as the models were trained
                const float angle = static_cast<float>(state.step.positions[m]) * frequency;
                *turn++ = static_cast<float>(std::cos(double(angle)));
                *turn++ = static_cast<float>(std::sin(double(angle)));
            }
        }
    }
    barrier_.wait();
}

void Engine::norm(const Norm& op, State& state, int worker) {
    const Rows& from = buffers_[std::size_t(op.from)];
    const bool own = state.own && op.to == Buffer::normed;
    Rows& to = own ? workers_[std::size_t(worker)].normed : buffers_[std::size_t(op.to)];
    const std::size_t columns = op.gain.empty() ? from.columns : op.gain.size();
    const NormOf how = {op.centred, op.eps, op.gain.empty() ? nullptr : op.gain.data(), op.bias.empty() ? nullptr : op.bias.data()};
    const auto [first, last] = own ? std::pair<std::size_t, std::size_t>{0, state.rows} : share(state.rows, worker, threads_);
    for (std::size_t m = first; m < last; ++m) {
        float* row = to.values.as<float>() + m * to.stride;
        state.run.norm_row(from.values.as<float>() + m * from.stride, columns, how, row);
        if (!exact_ && op.to == Buffer::normed)
            to.quantize(state.run, row, columns, state.rows, m);
    }
    if (!own) barrier_.wait();
}

void Engine::linear(const Linear& op, std::size_t index, State& state, int worker) {
    Worker& mine = workers_[std::size_t(worker)];
    const Rows& shared = buffers_[std::size_t(op.from)];
    Activations x;
    Activations coded;  // the same rows as int8 codes
    const std::size_t columns = op.parts[0].weight->tiled.columns;
    if (op.from == Buffer::normed) {
        x = coded = (state.own ? mine.normed : shared).view(state.rows);
    } else {
        x = shared.view(state.rows);
        if (quantizes(op, exact_)) {
            const Rows& to = state.own ? mine.source : shared;
            const auto [first, last] = state.own ? std::pair<std::size_t, std::size_t>{0, state.rows} : share(state.rows, worker, threads_);
            for (std::size_t m = first; m < last; ++m)
                to.quantize(state.run, shared.values.as<float>() + m * shared.stride, columns, state.rows, m);
            if (!state.own) barrier_.wait();
            coded = to.view(state.rows);
        }
    }
    const auto [wanted_first, wanted_last] = wanted_rows(state.step, state.rows);
    const Part* prepared = nullptr;  // whose weight and rows scratch is prepared for
    const auto product = [&](std::size_t p, std::size_t first, std::size_t last) {
        const Part& part = op.parts[p];
        const Tiled& w = part.weight->tiled;
        const bool fast = !exact_ && w.holds == Holds::codes;
        const std::size_t row = part.wanted_only ? wanted_first : 0, end = part.wanted_only ? wanted_last : state.rows;
        if (row == end) return;
        const Activations rows = some_rows(fast ? coded : x, row, end);
        Output out;
        if (op.to == Buffer::logits) {
            out.to = state.step.logits;
            out.stride = vocabulary_;
        } else {
            Rows& to = buffers_[std::size_t(op.to)];
            out.to = to.values.as<float>() + part.column + row * to.stride;
            out.stride = to.stride;
        }
        out.bias = part.bias.empty() ? nullptr : part.bias.data();
        out.activation = op.gated && p == 1 ? Activation::none : op.activation;
        out.times = op.gated && p == 1;
        out.add = op.add;
        out.scale = op.scale;
        if (fast && (prepared == nullptr || prepared->wanted_only != part.wanted_only || !prepared_alike(prepared->weight->tiled, w))) {
            state.run.prepare(w, rows, mine.scratch.as());
            prepared = &part;
        }
        state.run.product(w, rows, out, first, last, fast, mine.scratch.as());
    };
    // Pieces of all parts, taken as they come; a gated pair goes together.
    const std::size_t parts = op.gated ? 1 : op.parts.size();
    const std::size_t pieces = piece_count(threads_, state.rows);
    for (;;) {
        const std::size_t at = taken_[index].fetch_add(1, std::memory_order_relaxed);
        if (at >= parts * pieces) break;
        const std::size_t p = at / pieces;
        const Part& part = op.parts[p];
        const auto [first, last] = piece(part.last - part.first, at % pieces, threads_, state.rows);
        if (first == last) continue;
        product(p, part.first + first, part.first + last);
        if (op.gated) product(1, first, last);
    }
    barrier_.wait();
}

}  // namespace nybble
