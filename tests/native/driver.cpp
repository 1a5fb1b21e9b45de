// Walks through the kernels and the engine without Python, for builds with sanitizers (tools/sanitize.sh). Every buffer is
// exactly as large as the interface asks for, so that a read or write past it is seen; every result is compared, to the bit,
// with the first instruction set's and one thread's.
#include "../../src/nybble/engine/engine.hpp"
#include "../../src/nybble/engine/sample.hpp"
#include "../../src/nybble/kernels/cpu.hpp"
#include "../../src/nybble/kernels/threads.hpp"
#include "../../src/nybble/kernels/weight.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace nybble;

namespace {

std::mt19937 random_bits(1);

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "driver: %s\n", what.c_str());
    std::exit(1);
}

void check(bool right, const std::string& what) {
    if (!right) fail(what + " (" + kernels().name + ")");
}

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }

std::vector<float> floats(std::size_t count, float size = 1.0f) {
    std::vector<float> out(count);
    for (float& v : out) v = uniform(-size, size);
    return out;
}

bool equal(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

// Calls f with every instruction set of the machine; ends with the best.
template <class F>
void with_each(F f) {
    for (const Kernels* k : usable()) {
        select(k->name);
        f();
    }
}

// ---- a packed weight that owns what it points to ----------------------------------------------------------------------

struct Stored {
    Weight weight{};
    std::vector<std::uint8_t> codes, packed;
    std::vector<float> scale, offset, levels;

    Stored(int bits, std::size_t rows, std::size_t columns, std::size_t block, bool table, bool with_offset) : levels(256) {
        Weight& w = weight;
        w.rows = rows;
        w.columns = columns;
        w.bits = bits;
        w.row_bytes = (columns * std::size_t(bits) + 7) / 8;
        w.block = std::min(block, columns);
        w.blocks = (columns + w.block - 1) / w.block;
        codes.resize(rows * columns);
        for (auto& c : codes) c = std::uint8_t(random_bits() & ((1u << bits) - 1));
        packed.resize(rows * w.row_bytes);
        kernels().pack(codes.data(), packed.data(), rows, columns, bits);
        scale = floats(rows * w.blocks, 0.1f);
        if (with_offset) offset = floats(rows * w.blocks, 3.0f);
        const std::size_t count = std::size_t(1) << bits;
        for (std::size_t i = 0; i < 256; ++i)
            levels[i] = table ? std::sin(float(i % count)) : float(i % count) - float(count / 2);
        w.affine = !table;
        w.shift = table ? 0 : -std::int32_t(count / 2);
        w.levels = levels.data();
        w.packed = packed.data();
        w.packed_end = packed.data() + packed.size();
        w.scale = scale.data();
        w.scale_stride = w.blocks;
        w.offset = with_offset ? offset.data() : nullptr;
        w.offset_stride = with_offset ? w.blocks : 0;
    }
};

std::vector<float> product(const LaidWeight& weight, const std::vector<float>& x, std::size_t count, bool exact, int threads) {
    const Tiled& w = weight.tiled;
    const Kernels& run = kernels();
    const bool fast = !exact && w.holds == Holds::codes;
    const std::size_t stride = (w.columns + kBlock - 1) / kBlock * kBlock, most = (count + kPanel - 1) / kPanel * kPanel;
    std::vector<float> values(count * stride), scale(most * stride / kBlock), out(count * w.rows);
    std::vector<std::int8_t> codes(most * stride);
    std::vector<std::int32_t> sums(most * stride / 16);
    for (std::size_t m = 0; m < count; ++m) {
        run.quantize_row(x.data() + m * w.columns, w.columns, {codes.data(), scale.data(), sums.data(), stride, count, m});
        std::copy_n(x.data() + m * w.columns, w.columns, values.data() + m * stride);
    }
    const Activations laid = {count, stride, values.data(), codes.data(), scale.data(), sums.data()};
    Output to;
    to.to = out.data();
    to.stride = w.rows;
    const std::size_t pieces = std::min(w.tiles, std::size_t(threads) * 2);
    std::vector<Memory> scratch;
    for (int t = 0; t < threads; ++t) scratch.emplace_back(product_scratch(w, count));
    parallel(pieces, threads, [&](std::size_t p, int worker) {
        if (fast) run.prepare(w, laid, scratch[std::size_t(worker)].as());
        run.product(w, laid, to, w.tiles * p / pieces, w.tiles * (p + 1) / pieces, fast, scratch[std::size_t(worker)].as());
    });
    return out;
}

void packing() {
    for (int bits = 1; bits <= 8; ++bits)
        for (const std::size_t columns : {1u, 7u, 33u, 64u, 172u}) {
            const Stored s(bits, 5, columns, 64, false, false);
            std::vector<float> first;
            with_each([&] {
                std::vector<std::uint8_t> packed(s.packed.size()), codes(s.codes.size());
                kernels().pack(s.codes.data(), packed.data(), 5, columns, bits);
                check(packed == s.packed, "packing differs");
                kernels().unpack(packed.data(), codes.data(), 5, columns, bits);
                check(codes == s.codes, "unpacking differs");
                std::vector<float> rows(5 * columns);
                Memory scratch(scratch_bytes(s.weight));
                for (std::size_t n = 0; n < 5; ++n) kernels().decode_row(s.weight, n, rows.data() + n * columns, scratch.as());
                if (first.empty()) first = rows;
                check(equal(rows, first), "decoding differs");
            });
        }
}

void products_of(const LaidWeight& weight, std::size_t count) {
    const std::vector<float> x = floats(count * weight.tiled.columns, 2.0f);
    for (const bool exact : {true, false}) {
        std::vector<float> first;
        with_each([&] {
            for (const int threads : {1, 3}) {
                const std::vector<float> y = product(weight, x, count, exact, threads);
                if (first.empty()) first = y;
                check(equal(y, first), "products differ: " + std::to_string(count) + " rows, exact " + std::to_string(exact));
            }
        });
    }
}

void products() {
    for (int bits = 2; bits <= 8; ++bits)
        for (const int form : {0, 1, 2}) {
            if (form == 2 && bits > 4) continue;
            for (const std::size_t columns : {33u, 64u, 172u})
                for (const std::size_t block : {16u, 32u, 96u, 1000u}) {
                    const Stored s(bits, 35, columns, block, form == 2, form == 1);
                    const LaidWeight weight(s.weight, false, 2);
                    for (const std::size_t count : {1u, 4u, 9u}) products_of(weight, count);
                    if (weight.tiled.holds != Holds::codes) continue;  // decoded once: nothing to restore
                    with_each([&] {
                        std::vector<std::uint8_t> packed(s.packed.size());
                        std::vector<float> scale(s.scale.size()), offset(s.offset.size());
                        weight.restore(packed.data(), scale.data(), offset.data(), 2);
                        check(packed == s.packed && equal(scale, s.scale) && equal(offset, s.offset), "restoring differs");
                        std::vector<float> row(columns);
                        for (std::size_t n = 0; n < 35; ++n) kernels().tiled_row(weight.tiled, n, row.data());
                    });
                }
        }
    const std::vector<float> values = floats(35 * 44);
    std::vector<std::uint16_t> halves(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) halves[i] = std::uint16_t(0x3c00 + random_bits() % 1024);
    for (const bool transposed : {false, true}) {
        products_of(LaidWeight(FloatSource{values.data(), Holds::f32, 35, 44, transposed}, false, 2), 9);
        products_of(LaidWeight(FloatSource{halves.data(), Holds::f16, 35, 44, transposed}, false, 2), 9);
        products_of(LaidWeight(FloatSource{halves.data(), Holds::bf16, 35, 44, transposed}, false, 2), 9);
    }
    const Stored odd(5, 35, 172, 7, true, true);  // no kernel knows it: float32
    products_of(LaidWeight(odd.weight, false, 2), 5);
}

// ---- a model of two layers ----------------------------------------------------------------------------------------------

using WeightPtr = std::shared_ptr<LaidWeight>;

struct Model {
    static constexpr std::size_t vocabulary = 53, width = 72, heads = 6, shared = 2, inner = 100;
    std::size_t dimensions;
    std::vector<WeightPtr> weights;
    std::vector<std::vector<float>> gains;
    std::vector<Stored> stored;

    WeightPtr matrix(int bits, std::size_t rows, std::size_t columns) {
        stored.emplace_back(bits, rows, columns, 32, false, bits == 3);
        for (float& v : stored.back().scale) v *= 0.3f;
        return std::make_shared<LaidWeight>(stored.back().weight, false, 1);
    }

    explicit Model(std::size_t head) : dimensions(head) {
        stored.reserve(64);
        weights.push_back(matrix(8, vocabulary, width));
        weights.push_back(matrix(8, 96, width));  // positions
        for (int layer = 0; layer < 2; ++layer) {
            weights.push_back(matrix(4, heads * head, width));
            weights.push_back(matrix(3, shared * head, width));
            weights.push_back(matrix(6, shared * head, width));
            weights.push_back(matrix(5, width, heads * head));
            weights.push_back(matrix(4, inner, width));
            weights.push_back(matrix(4, inner, width));
            weights.push_back(matrix(8, width, inner));
        }
        for (int i = 0; i < 6; ++i) gains.push_back(floats(width));
        gains.push_back(floats(head));
    }

    static Part part(const WeightPtr& weight, std::size_t column, bool bias) {
        const std::size_t filled = weight->tiled.tiles * kRows;
        return {weight, bias ? padded(std::vector<float>(weight->tiled.rows, 0.25f).data(), weight->tiled.rows, filled) : std::vector<float>(), column};
    }

    void linear(Engine& e, Buffer from, Buffer to, std::vector<Part> parts, Activation activation, bool add, bool gated) const {
        Op op{};
        op.kind = Op::Kind::linear;
        op.linear = {from, to, std::move(parts), activation, add, gated, 1.0f};
        e.append(std::move(op));
    }

    void norm(Engine& e, Buffer from, Buffer to, bool centred, std::size_t gain) const {
        Op op{};
        op.kind = Op::Kind::norm;
        op.norm = {from, to, centred, 1e-5f, gains[gain], centred ? gains[gain] : std::vector<float>()};
        e.append(std::move(op));
    }

    std::unique_ptr<Engine> engine(int threads, bool exact, CacheType cache) const {
        auto e = std::make_unique<Engine>(threads, exact, cache);
        Op embed{};
        embed.kind = Op::Kind::embed;
        embed.embed = {weights[0], weights[1], 2, 1.5f};
        e->append(std::move(embed));
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const WeightPtr* w = weights.data() + 2 + 7 * layer;
            const bool gated = layer == 0;
            norm(*e, Buffer::residual, Buffer::normed, layer == 1, 2 * layer);
            const std::size_t queries = heads * dimensions, keys = shared * dimensions;
            linear(*e, Buffer::normed, Buffer::projected, {part(w[0], 0, true), part(w[1], queries, false), part(w[2], queries + keys, true)},
                   Activation::none, false, false);
            Op attend{};
            attend.kind = Op::Kind::attention;
            Attention& a = attend.attention;
            a.layer = layer;
            a.heads = heads;
            a.shared = shared;
            a.dimensions = dimensions;
            a.scale = 0.3f;
            if (layer == 0) {
                a.rotary = 8;
                a.rotation = e->rotation({1.0f, 0.5f, 0.1f, 0.01f});
                a.window = 11;
                a.query_gain = a.key_gain = gains[6];
            } else {
                a.cap = 5.0f;
            }
            e->append(std::move(attend));
            if (layer == 1) {  // no row needs another behind the last attention
                Op select{};
                select.kind = Op::Kind::select;
                e->append(std::move(select));
            }
            if (layer == 0) {
                linear(*e, Buffer::mixed, Buffer::residual, {part(w[3], 0, false)}, Activation::none, true, false);
            } else {  // with a norm of its own
                linear(*e, Buffer::mixed, Buffer::projected, {part(w[3], 0, false)}, Activation::none, false, false);
                norm(*e, Buffer::projected, Buffer::projected, false, 5);
                Op add{};
                add.kind = Op::Kind::add;
                add.add = {Buffer::projected, Buffer::residual};
                e->append(std::move(add));
            }
            norm(*e, Buffer::residual, Buffer::normed, false, 2 * layer + 1);
            std::vector<Part> wide = {part(w[4], 0, true)};
            if (gated) wide.push_back(part(w[5], 0, false));
            linear(*e, Buffer::normed, Buffer::inner, std::move(wide), gated ? Activation::silu : Activation::gelu, false, gated);
            linear(*e, Buffer::inner, Buffer::residual, {part(w[6], 0, true)}, Activation::none, true, false);
        }
        norm(*e, Buffer::residual, Buffer::normed, false, 4);
        linear(*e, Buffer::normed, Buffer::logits, {part(weights[0], 0, false)}, Activation::none, false, false);
        Op cap{};
        cap.kind = Op::Kind::cap;
        cap.cap.cap = 20.0f;
        e->append(std::move(cap));
        e->finish(vocabulary, 64);
        return e;
    }
};

// Rows (token, position, sequence) through the engine; the logits of the rows that are wanted.
std::vector<float> run(Engine& e, const std::vector<std::int64_t>& tokens, const std::vector<std::int64_t>& positions,
                       const std::vector<std::int64_t>& sequences, const std::vector<std::int64_t>& wanted) {
    std::vector<float> logits(wanted.size() * Model::vocabulary);
    e.run({tokens.size(), tokens.data(), positions.data(), sequences.data(), wanted.size(), wanted.data(), logits.data()});
    for (const float v : logits) check(std::isfinite(v), "logits are not finite");
    return logits;
}

// A prompt in one run, in two, and token by token; then three texts side by side. All logits of position 39.
std::vector<float> story(Engine& e) {
    constexpr std::int64_t length = 40;
    std::vector<std::int64_t> tokens(length), positions(length), sequences(length, 0), all;
    for (std::int64_t i = 0; i < length; ++i) {
        tokens[std::size_t(i)] = (i * 17 + 5) % std::int64_t(Model::vocabulary);
        positions[std::size_t(i)] = i;
    }
    e.reserve(3, 48);
    const std::vector<float> whole = run(e, tokens, positions, sequences, {length - 1});
    e.reserve(3, 48);
    const auto slice = [](const std::vector<std::int64_t>& v, std::int64_t from, std::int64_t to) {
        return std::vector<std::int64_t>(v.begin() + from, v.begin() + to);
    };
    run(e, slice(tokens, 0, 33), slice(positions, 0, 33), slice(sequences, 0, 33), {});
    check(equal(run(e, slice(tokens, 33, 40), slice(positions, 33, 40), slice(sequences, 33, 40), {6}), whole), "two runs differ from one");
    e.reserve(3, 48);
    std::vector<float> last;
    for (std::int64_t i = 0; i < length; ++i) last = run(e, {tokens[std::size_t(i)]}, {i}, {0}, {0});
    check(equal(last, whole), "token by token differs from one run");
    e.reserve(3, 48);
    for (std::int64_t s = 0; s < 3; ++s)  // text s begins with s + 1 tokens
        run(e, slice(tokens, 0, s + 1), slice(positions, 0, s + 1), std::vector<std::int64_t>(std::size_t(s + 1), s), {s});
    std::vector<float> batch;
    for (std::int64_t i = 1; i < length; ++i) {
        std::vector<std::int64_t> now, where, which, want;
        for (std::int64_t s = 0; s < 3; ++s)
            if (i + s < length) {
                now.push_back(tokens[std::size_t(i + s)]);
                where.push_back(i + s);
                which.push_back(s);
                want.push_back(std::int64_t(want.size()));
            }
        batch = run(e, now, where, which, want);
        const std::vector<float> end(batch.end() - std::int64_t(Model::vocabulary), batch.end());
        if (where.back() == length - 1) check(equal(end, whole), "a text among others differs from the text alone");
    }
    return whole;
}

void engines() {
    for (const std::size_t head : {16u, 24u}) {
        const Model model(head);
        for (const CacheType cache : {CacheType::f32, CacheType::f16, CacheType::int16, CacheType::int8, CacheType::int4})
            for (const bool exact : {true, false}) {
                std::vector<float> first;
                with_each([&] {
                    for (const int threads : {2, 1, 5}) {
                        if (threads != 2 && kernels().name != usable().back()->name) continue;
                        const auto e = model.engine(threads, exact, cache);
                        const std::vector<float> logits = story(*e);
                        if (first.empty()) first = logits;
                        check(equal(logits, first), "engines differ: " + std::to_string(threads) + " threads, cache " +
                                                        std::to_string(int(cache)) + ", exact " + std::to_string(exact));
                    }
                });
            }
    }
}

// Callers at the same time: the pool serves one, the others work alone or wait.
void crowd() {
    const Stored s(4, 300, 172, 64, false, true);
    const LaidWeight weight(s.weight, false, 2);
    const std::vector<float> x = floats(9 * 172);
    const std::vector<float> wanted = product(weight, x, 9, false, 1);
    const Model model(16);
    const auto quiet = model.engine(1, false, CacheType::int16);
    const std::vector<float> told = story(*quiet);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i)
        callers.emplace_back([&] {
            for (int n = 0; n < 20; ++n) check(equal(product(weight, x, 9, false, 2), wanted), "callers disturb each other");
        });
    for (int i = 0; i < 2; ++i)
        callers.emplace_back([&] {
            const auto e = model.engine(2, false, CacheType::int16);
            check(equal(story(*e), told), "engines disturb each other");
        });
    for (std::thread& t : callers) t.join();
}

void sampling() {
    const std::vector<float> logits = floats(97, 4.0f);
    const std::vector<std::int64_t> history = {3, 5, 8};
    for (const double temperature : {0.0, 0.7, 2.0})
        for (const std::size_t top_k : {0u, 1u, 5u, 97u})
            for (const double top_p : {0.3, 1.0})
                for (const double u : {0.0, 0.5, 0.999999}) {
                    const auto got = choose(logits.data(), logits.size(), history.data(), history.size(), {temperature, top_k, top_p, 0.01, 1.2}, u);
                    check(got >= 0 && got < 97, "a token out of range");
                }
    for (std::size_t count = 1; count < 40; ++count) {
        const std::vector<float> some = floats(count);
        with_each([&] {
            const std::size_t best = kernels().best_of(some.data(), count);
            check(some[best] == *std::max_element(some.begin(), some.end()), "not the largest");
        });
    }
}

// ---- scales and codes of weights ----------------------------------------------------------------------------------------

Levels levels_from(float lowest, int count, bool whole) {
    Levels out{};
    out.lowest = lowest;
    out.highest = lowest + float(count - 1);
    out.whole = whole;
    for (int i = 0; i < 16; ++i) {
        out.at[i] = lowest + float(std::min(i, count - 1)) * (whole ? 1.0f : 1.5f);
        out.between[i] = i + 1 < count ? out.at[i] + 0.75f : INFINITY;
    }
    return out;
}

// Runs of every shape, fewer than sixteen and all, with importance and without: the same from every instruction set.
void searching() {
    const float tries[] = {15, 0, 14.5f, 0.25f, -17, 1}, dividers[] = {63, 60, -70};
    for (const bool important : {false, true})
        for (const int shape : {0, 1, 2, 3})
            for (const std::size_t count : {std::size_t(1), std::size_t(16)}) {
                Search how{};
                how.levels = levels_from(shape == 0 ? 0.0f : -8.0f, 16, shape != 2);
                how.block = shape == 1 ? 16 : 32;
                how.blocks = shape == 3 ? 1 : 256 / how.block;
                how.shifted = shape == 0;
                how.low = shape == 3 ? 1.0f : shape == 0 ? 0.0f : -32.0f;
                how.high = shape == 3 ? 1.0f : shape == 0 ? 63.0f : 31.0f;
                how.tries = tries;
                how.dividers = dividers;
                how.plains = 1;
                how.tries_count = how.dividers_count = 3;
                const std::size_t run = how.block * how.blocks;
                std::vector<std::vector<float>> weights, importances;
                for (std::size_t i = 0; i < count; ++i) {
                    weights.push_back(floats(run));
                    importances.push_back(floats(run));
                    for (float& h : importances.back()) h = std::fabs(h) + 1e-3f;
                }
                std::vector<std::uint8_t> first;
                with_each([&] {
                    std::vector<std::vector<std::uint8_t>> codes(count, std::vector<std::uint8_t>(run));
                    std::vector<std::uint16_t> d(16), dmin(16);
                    std::vector<std::int8_t> m(16 * how.blocks), n(16 * how.blocks);
                    SixteenRuns runs{};
                    for (std::size_t i = 0; i < 16; ++i) {
                        const std::size_t at = std::min(i, count - 1);
                        runs.weight[i] = weights[at].data();
                        runs.importance[i] = important ? importances[at].data() : nullptr;
                        runs.codes[i] = i < count ? codes[i].data() : nullptr;
                    }
                    runs.d = d.data();
                    runs.dmin = dmin.data();
                    runs.m = m.data();
                    runs.n = n.data();
                    kernels().search_runs(how, runs);
                    std::vector<std::uint8_t> all;
                    for (const auto& row : codes) all.insert(all.end(), row.begin(), row.end());
                    for (std::size_t i = 0; i < count; ++i) all.insert(all.end(), {std::uint8_t(d[i]), std::uint8_t(d[i] >> 8)});
                    for (std::size_t b = 0; b < how.blocks; ++b) all.push_back(std::uint8_t(m[16 * b]));
                    if (first.empty()) first = all;
                    check(all == first, "a search found something else");
                });
            }
}

void rounding() {
    for (const std::size_t columns : {std::size_t(1), std::size_t(17), std::size_t(70)})
        for (const bool whole : {false, true}) {
            const Levels levels = levels_from(-8.0f, 16, whole);
            const std::size_t blocks = (columns + 31) / 32;
            const auto weight = floats(columns), scale = floats(blocks, 0.1f), offset = floats(blocks);
            std::vector<std::uint8_t> first;
            with_each([&] {
                std::vector<std::uint8_t> codes(columns);
                kernels().nearest_row(levels, weight.data(), columns, 32, scale.data(), offset.data(), codes.data());
                if (first.empty()) first = codes;
                check(codes == first, "a nearest level is another one");
            });
        }
    for (const RoundBy rule : {RoundBy::range, RoundBy::ends, RoundBy::away}) {
        std::vector<std::vector<float>> weights;
        for (int i = 0; i < 5; ++i) weights.push_back(floats(32));
        std::vector<std::uint8_t> first;
        with_each([&] {
            std::vector<std::vector<std::uint8_t>> codes(5, std::vector<std::uint8_t>(32));
            std::vector<float> scale(16), shift(16);
            SixteenBlocks blocks{};
            for (std::size_t i = 0; i < 16; ++i) {
                blocks.weight[i] = weights[std::min<std::size_t>(i, 4)].data();
                blocks.codes[i] = i < 5 ? codes[i].data() : nullptr;
            }
            blocks.scale = scale.data();
            blocks.shift = shift.data();
            blocks.block = 32;
            blocks.bits = 5;
            kernels().round_sixteen(blocks, rule);
            std::vector<std::uint8_t> all;
            for (const auto& row : codes) all.insert(all.end(), row.begin(), row.end());
            if (first.empty()) first = all;
            check(all == first, "a rounded block is another one");
        });
    }
}

}  // namespace

int main() {
    const struct {
        const char* name;
        void (*part)();
    } parts[] = {{"packing", packing}, {"products", products}, {"engines", engines}, {"crowd", crowd}, {"sampling", sampling},
                 {"searching", searching}, {"rounding", rounding}};
    for (const auto& p : parts) {
        p.part();
        std::printf("%s: fine on", p.name);
        for (const Kernels* k : usable()) std::printf(" %s", k->name);
        std::printf("\n");
        std::fflush(stdout);
    }
    return 0;
}
