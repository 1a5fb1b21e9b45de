// Compares NEON with plain C++, to the bit: every operation on sixteen lanes (lanes_neon.hpp), then every kernel, with random
// and with hostile numbers. It needs no ARM machine, only a cross compiler and an emulator of its programs; from the root:
//
//     aarch64-linux-gnu-g++ -std=c++20 -O1 -ffp-contract=off -march=armv8.2-a+dotprod -DNYBBLE_ARM64 -static -pthread
//         -o build/neon tests/native/neon.cpp src/nybble/kernels/{weight,cpu,threads}.cpp && qemu-aarch64-static build/neon
//
// The digest it ends with covers all results of plain C++, any NaN counted as one. Built on another machine without -march and
// -DNYBBLE_ARM64 the same digest must come out.
#include "../../src/nybble/kernels/cpu.hpp"
#include "../../src/nybble/kernels/weight.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

// The instruction sets themselves, for their lanes; they are not linked a second time.
#include "../../src/nybble/kernels/isa_scalar.cpp"
#ifdef NYBBLE_ARM64
#include <arm_neon.h>
#undef NYBBLE_ISA
#undef NYBBLE_TABLE
#include "../../src/nybble/kernels/isa_neon.cpp"
#undef NYBBLE_ISA
#undef NYBBLE_TABLE
#include "../../src/nybble/kernels/isa_neondot.cpp"
#endif

using namespace nybble;

namespace {

std::mt19937 random_bits(7);
std::uint64_t digest = 14695981039346656037u;
std::size_t compared = 0;

std::size_t below(std::size_t count) { return random_bits() % count; }

float float_of(std::uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

std::uint32_t bits_of(float v) {  // any NaN as one
    std::uint32_t out;
    std::memcpy(&out, &v, 4);
    return v == v ? out : 0x7fc00000u;
}

float normal() { return (float(random_bits() >> 8) / 16777216.0f - 0.5f) * 4.0f; }

// A number that conversions, comparisons or roundings may get wrong.
float hostile() {
    static const std::uint32_t some[] = {
        0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x00000001, 0x80000001,
        0x007fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x4f000000, 0xcf000000, 0x4effffff, 0xcf000001, 0x3f000000, 0xbf000000,
        0x3fc00000, 0x40200000, 0xbfc00000, 0x42fd0000, 0x42ff0000, 0x43000000, 0x43008000, 0xc3008000, 0x477fe000, 0x477fefff,
        0x477ff000, 0xc77ff000, 0x33800000, 0x33000000, 0x33000001, 0x33c00000, 0x32ffffff, 0x38800000, 0x387fffff, 0x387fe000,
        0x387fdfff, 0x387ff000, 0x3f801000, 0x3f803000, 0x3f801001, 0x42b17218, 0xc2aeac50, 0x0da24260, 0x0da2425f, 0x4b000001};
    switch (below(4)) {
        case 0: return float_of(std::uint32_t(random_bits()));
        case 1: return normal();
        default: return float_of(some[below(sizeof some / sizeof *some)]);
    }
}

std::int32_t hostile_whole() {
    static const std::int32_t some[] = {0, 1, -1, 127, 128, -127, -128, -129, 255, 256, 32767, 32768, -32769, 16777217, 33554433, INT32_MAX, INT32_MIN};
    return below(2) == 0 ? std::int32_t(random_bits()) : some[below(sizeof some / sizeof *some)];
}

[[noreturn]] void fail(const std::string& what, const char* name, std::size_t at) {
    std::fprintf(stderr, "neon: %s of %s differs at %zu\n", what.c_str(), name, at);
    std::exit(1);
}

void note(const void* from, std::size_t bytes) {
    const auto* at = static_cast<const std::uint8_t*>(from);
    for (std::size_t i = 0; i < bytes; ++i) digest = (digest ^ at[i]) * 1099511628211u;
}

// Results of plain C++ go to the digest; those of `name` must be the same.
template <class T>
void same(const std::string& what, const char* name, const std::vector<T>& wanted, const std::vector<T>& got) {
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        bool right;
        if constexpr (std::is_same_v<T, float>)
            right = bits_of(wanted[i]) == bits_of(got[i]);
        else
            right = wanted[i] == got[i];
        if (!right) fail(what, name, i);
    }
    compared += wanted.size();
}

template <class T>
void note(const std::vector<T>& values) {
    for (const T v : values) {
        if constexpr (std::is_same_v<T, float>) {
            const std::uint32_t bits = bits_of(v);
            note(&bits, 4);
        } else {
            note(&v, sizeof v);
        }
    }
}

// f(kernels) gives a vector: the same for every instruction set.
template <class F>
void with_each(const std::string& what, F f) {
    const auto wanted = f(kScalar);
    note(wanted);
    for (const Kernels* k : usable())
        if (k != &kScalar) same(what, k->name, wanted, f(*k));
}

// ---- operations ---------------------------------------------------------------------------------------------------------

#ifdef NYBBLE_ARM64
using S = scalar::Lanes;

template <class L>
struct Operations {
    const char* name;
    float x[16] = {}, y[16] = {}, z[16] = {};
    std::int32_t p[16] = {}, q[16] = {};

    void floats(const char* what, typename L::F got, S::F wanted) const {
        std::vector<float> a(16), b(16);
        L::store(a.data(), got);
        S::store(b.data(), wanted);
        same(what, name, b, a);
    }
    void wholes(const char* what, typename L::I got, S::I wanted) const {
        std::vector<std::int32_t> a(16), b(16);
        L::store_line(a.data(), got);
        S::store_line(b.data(), wanted);
        same(what, name, b, a);
    }
    template <int N>
    void shifts() const {
        wholes("right", L::template right<N>(L::line(p)), S::right<N>(S::line(p)));
        wholes("left", L::template left<N>(L::line(p)), S::left<N>(S::line(p)));
        if constexpr (N < 31) shifts<N + 1>();
    }

    void round() {
        for (int i = 0; i < 16; ++i) {
            x[i] = hostile();
            y[i] = below(8) == 0 ? x[i] : hostile();
            z[i] = hostile();
            p[i] = hostile_whole();
            q[i] = hostile_whole();
        }
        const auto a = L::load(x), b = L::load(y), c = L::load(z);
        const auto d = S::load(x), e = S::load(y), f = S::load(z);
        const auto m = L::line(p), n = L::line(q);
        const auto u = S::line(p), v = S::line(q);
        floats("load", a, d);
        floats("all", L::all(x[3]), S::all(x[3]));
        floats("add", L::add(a, b), S::add(d, e));
        floats("sub", L::sub(a, b), S::sub(d, e));
        floats("mul", L::mul(a, b), S::mul(d, e));
        floats("div", L::div(a, b), S::div(d, e));
        floats("fma", L::fma(a, b, c), S::fma(d, e, f));
        floats("max", L::max(a, b), S::max(d, e));
        floats("min", L::min(a, b), S::min(d, e));
        floats("abs", L::abs(a), S::abs(d));
        floats("sqrt", L::sqrt(a), S::sqrt(d));
        floats("to_float", L::to_float(m), S::to_float(u));
        floats("as_float", L::as_float(m), S::as_float(u));
        floats("float_table", L::float_table(a, m), S::float_table(d, u));
        wholes("line", m, u);
        wholes("whole", L::whole(p[0]), S::whole(p[0]));
        wholes("bytes", L::bytes(std::uint8_t(p[0])), S::bytes(std::uint8_t(p[0])));
        wholes("four", L::four(reinterpret_cast<const std::int8_t*>(p) + 3), S::four(reinterpret_cast<const std::int8_t*>(p) + 3));
        wholes("both", L::both(m, n), S::both(u, v));
        wholes("either", L::either(m, n), S::either(u, v));
        wholes("plus", L::plus(m, n), S::plus(u, v));
        wholes("minus", L::minus(m, n), S::minus(u, v));
        wholes("most", L::most(m, n), S::most(u, v));
        wholes("to_whole", L::to_whole(a), S::to_whole(d));
        wholes("as_whole", L::as_whole(a), S::as_whole(d));
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(q);
        wholes("load_bytes", L::load_bytes(bytes), S::load_bytes(bytes));
        wholes("byte_table", L::byte_table(bytes), S::byte_table(bytes));
        wholes("look_up", L::look_up(L::byte_table(bytes), L::both(m, L::bytes(15))), S::look_up(S::byte_table(bytes), S::both(u, S::bytes(15))));
        same<std::int32_t>("largest", name, {S::largest(u)}, {L::largest(m)});
        std::vector<std::int8_t> low(16), wanted_low(16);
        L::store_bytes(low.data(), m);
        S::store_bytes(wanted_low.data(), u);
        same("store_bytes", name, wanted_low, low);
        halves(x);
        shifts<1>();
        dots();
    }

    // Halves compare as floats again where they are NaN: which NaN does not matter.
    void halves(const float* values) const {
        std::vector<std::uint16_t> a(16), b(16);
        L::store_half(a.data(), L::load(values));
        S::store_half(b.data(), S::load(values));
        for (int i = 0; i < 16; ++i)
            if (values[i] != values[i]) a[i] = b[i] = std::uint16_t((a[i] & 0x7fffu) > 0x7c00u && (b[i] & 0x7fffu) > 0x7c00u ? 0 : i);
        same("store_half", name, b, a);
        floats("load_half", L::load_half(b.data()), S::load_half(b.data()));
        floats("load_bfloat", L::load_bfloat(b.data()), S::load_bfloat(b.data()));
    }

    // Codes of all sizes with activations from -127 to 127, full of the ends of both.
    void dots() {
        std::int32_t sums[16];
        std::uint8_t w[64];
        std::int8_t v[64];
        const int kind = int(below(3));
        for (int i = 0; i < 64; ++i) {
            static const std::uint8_t ends[] = {0, 1, 127, 128, 129, 255};
            w[i] = kind == 0 || below(2) == 0 ? ends[kind == 0 ? i / 16 : below(6)] : std::uint8_t(random_bits());
            v[i] = below(3) == 0 ? std::int8_t(int(below(255)) - 127) : std::int8_t(below(2) == 0 || kind == 0 ? 127 : -127);
        }
        for (auto& s : sums) s = std::int32_t(random_bits()) / 4;
        wholes("dot", L::dot(L::line(sums), L::line(w), L::line(v)), S::dot(S::line(sums), S::line(w), S::line(v)));
        wholes("dot", L::dot(L::line(sums), L::line(w), L::four(v + 5)), S::dot(S::line(sums), S::line(w), S::four(v + 5)));
        same<std::int32_t>("total", name, {S::total(S::right<4>(S::line(w)))}, {L::total(L::template right<4>(L::line(w)))});
    }

    void all() {
        for (int i = 0; i < 4000; ++i) round();
        for (std::uint32_t h = 0; h < 65536; h += 16) {
            std::uint16_t at[16];
            for (std::uint32_t i = 0; i < 16; ++i) at[i] = std::uint16_t(h + i);
            floats("load_half", L::load_half(at), S::load_half(at));
            floats("load_bfloat", L::load_bfloat(at), S::load_bfloat(at));
        }
        for (std::uint32_t top = 0; top < 65536; ++top) {  // every sign, exponent and begin of a fraction
            float at[16];
            for (std::uint32_t i = 0; i < 16; ++i) at[i] = float_of(top << 16 | (i < 8 ? 0x0ffcu + i : 0x8ffcu + i - 8));
            halves(at);
        }
    }
};
#endif

// ---- kernels ------------------------------------------------------------------------------------------------------------

std::uint16_t half(float v) { return scalar::float_to_half(v); }

// Rows to multiply or to normalize: tame ones, and those that break things.
std::vector<float> rows_of(std::size_t kind, std::size_t rows, std::size_t columns) {
    std::vector<float> out(rows * columns);
    for (std::size_t i = 0; i < out.size(); ++i) switch (kind) {
            case 0: out[i] = normal(); break;
            case 1: out[i] = 1.0f; break;                           // all codes 127
            case 2: out[i] = below(2) == 0 ? 3.0f : -3.0f; break;  // all codes at the ends
            case 3: out[i] = normal() * 1e-39f; break;              // subnormal
            case 4: out[i] = normal() * 1e38f; break;
            case 5: out[i] = 0.0f; break;
            case 6: out[i] = std::int32_t(below(255)) * 0.5f - 63.5f; break;  // ties
            default: out[i] = below(columns) < 2 ? hostile() : normal(); break;
        }
    return out;
}
constexpr std::size_t kKinds = 8;

struct Stored {
    Weight w{};
    std::vector<std::uint8_t> codes, packed;
    std::vector<float> levels = std::vector<float>(256), scale, offset;
    std::vector<std::uint16_t> half_scale, half_offset;

    Stored(int bits, std::size_t rows, std::size_t columns, std::size_t block, int form, bool halves, std::size_t kind)
        : codes(rows * columns), packed(rows * ((columns * std::size_t(bits) + 7) / 8)) {
        const std::size_t count = std::size_t(1) << bits;
        w.rows = rows;
        w.columns = columns;
        w.bits = bits;
        w.row_bytes = packed.size() / rows;
        w.block = block < columns ? block : columns;
        w.blocks = (columns + w.block - 1) / w.block;
        for (auto& c : codes) c = std::uint8_t(kind == 0 ? below(count) : kind == 1 ? count - 1 : below(2) * (count - 1));
        kScalar.pack(codes.data(), packed.data(), rows, columns, bits);
        for (std::size_t i = 0; i < 256; ++i) levels[i] = form == 2 ? normal() : float(i % count) - float(count / 2);
        for (std::size_t i = count; i < 256; ++i) levels[i] = levels[i % count];
        for (std::size_t i = 0; i < rows * w.blocks; ++i) {
            scale.push_back(below(9) == 0 ? normal() * 1e-5f : normal() * 0.1f);
            offset.push_back(form == 1 ? normal() * 3.0f : 0.0f);
            half_scale.push_back(half(scale.back()));
            half_offset.push_back(half(offset.back()));
        }
        w.affine = form != 2;
        w.shift = form == 2 ? 0 : -std::int32_t(count / 2);
        w.levels = levels.data();
        w.packed = packed.data();
        w.packed_end = packed.data() + packed.size();
        w.scale_half = w.offset_half = halves;
        w.scale = halves ? static_cast<const void*>(half_scale.data()) : scale.data();
        w.offset = form != 1 ? nullptr : halves ? static_cast<const void*>(half_offset.data()) : offset.data();
        w.scale_stride = w.blocks;
        w.offset_stride = form == 1 ? w.blocks : 0;
    }
};

std::vector<float> product(const Kernels& k, const Tiled& w, const std::vector<float>& x, std::size_t count, bool fast, std::size_t round) {
    const std::size_t stride = (w.columns + kBlock - 1) / kBlock * kBlock, most = (count + kPanel - 1) / kPanel * kPanel;
    std::vector<float> values(count * stride), scale(most * stride / kBlock), bias(w.tiles * kRows, 0.25f);
    std::vector<float> out(count * w.rows, 0.5f);
    std::vector<std::int8_t> codes(most * stride);
    std::vector<std::int32_t> sums(most * stride / 16);
    for (std::size_t m = 0; m < count; ++m) {
        k.quantize_row(x.data() + m * w.columns, w.columns, {codes.data(), scale.data(), sums.data(), stride, count, m});
        std::memcpy(values.data() + m * stride, x.data() + m * w.columns, w.columns * sizeof(float));
    }
    Output to;
    to.to = out.data();
    to.stride = w.rows;
    to.bias = round % 3 == 0 ? nullptr : bias.data();
    to.activation = Activation(round % 6);
    to.add = round % 5 == 1;
    to.times = round % 5 == 2;
    to.scale = round % 4 == 0 ? 1.0f : 0.37f;
    Memory scratch(product_scratch(w, count));
    k.product(w, {count, stride, values.data(), codes.data(), scale.data(), sums.data()}, to, 0, w.tiles, fast, scratch.as());
    return out;
}

std::string words(const Tiled& w, std::size_t count, bool fast) {
    return std::string(fast ? "a fast" : "an exact") + " product (" + std::to_string(w.bits) + " bits, " + std::to_string(w.columns) +
           " columns, block " + std::to_string(w.block) + ", " + std::to_string(count) + " rows)";
}

void every_product(const Tiled& w) {
    static std::size_t round = 0;
    for (const std::size_t count : {1u, 2u, 4u, 5u, 8u, 9u, 17u}) {
        const std::vector<float> x = rows_of(++round % kKinds, count, w.columns);
        for (const bool fast : {false, true})
            if (!fast || w.holds == Holds::codes)
                with_each(words(w, count, fast), [&](const Kernels& k) { return product(k, w, x, count, fast, round / kKinds); });
    }
}

std::vector<std::uint8_t> everything(const LaidWeight& weight) {
    return {weight.tiled.data, weight.tiled.data + weight.tiled.tiles * weight.tiled.tile_bytes};
}

void weights() {
    std::size_t round = 0;
    for (int bits = 1; bits <= 8; ++bits)
        for (const int form : {0, 1, 2})
            for (const std::size_t columns : {16u, 33u, 64u, 172u})
                for (const std::size_t block : {16u, 32u, 96u, 1000u}) {
                    ++round;
                    const Stored s(bits, 35, columns, block, form, round % 2 == 0, round % 3);
                    with_each("unpack", [&](const Kernels& k) {
                        std::vector<std::uint8_t> codes(s.codes.size()), again(s.packed.size());
                        k.unpack(s.packed.data(), codes.data(), 35, columns, bits);
                        k.pack(codes.data(), again.data(), 35, columns, bits);
                        codes.insert(codes.end(), again.begin(), again.end());
                        return codes;
                    });
                    with_each("decode_row", [&](const Kernels& k) {
                        std::vector<float> out(35 * columns);
                        Memory scratch(scratch_bytes(s.w));
                        for (std::size_t n = 0; n < 35; ++n) k.decode_row(s.w, n, out.data() + n * columns, scratch.as());
                        return out;
                    });
                    with_each("tile_codes", [&](const Kernels& k) {
                        select(k.name);
                        return everything(LaidWeight(s.w, false, 1));
                    });
                    const LaidWeight weight(s.w, false, 1);
                    Tiled w = weight.tiled;
                    every_product(w);
                    if (w.offset != nullptr) {  // the same as shifts in values: what no file gives, but the kernels know
                        w.offset_is_zero = false;
                        every_product(w);
                    }
                    with_each("tiled_row", [&](const Kernels& k) {
                        std::vector<float> out(35 * columns);
                        for (std::size_t n = 0; n < 35; ++n) k.tiled_row(w, n, out.data() + n * columns);
                        return out;
                    });
                    if (w.holds != Holds::codes) continue;
                    with_each("untile_codes", [&](const Kernels& k) {
                        std::vector<std::uint8_t> out(16 * columns);
                        k.untile_codes(w, 1, out.data());
                        return out;
                    });
                }
    std::vector<std::uint16_t> halves(35 * 44);
    for (auto& h : halves) h = half(normal());
    const std::vector<float> floats = rows_of(0, 35, 44);
    every_product(LaidWeight(FloatSource{floats.data(), Holds::f32, 35, 44, false}, false, 1).tiled);
    every_product(LaidWeight(FloatSource{halves.data(), Holds::f16, 35, 44, false}, false, 1).tiled);
    every_product(LaidWeight(FloatSource{halves.data(), Holds::bf16, 35, 44, false}, false, 1).tiled);
}

void single_rows() {
    for (std::size_t round = 0; round < 40 * kKinds; ++round) {
        const std::size_t columns = 1 + below(200), stride = (columns + kBlock - 1) / kBlock * kBlock;
        const std::vector<float> x = rows_of(round % kKinds, 1, columns), gain = rows_of(0, 1, columns);
        for (const std::size_t rows : {1u, 8u}) {
            std::vector<float> scales;
            std::vector<std::int32_t> sums;
            with_each("the codes of quantize_row", [&](const Kernels& k) {
                std::vector<std::int8_t> codes(rows * stride);
                scales.assign(rows * stride / kBlock, 0.0f);
                sums.assign(rows * stride / 16, 0);
                k.quantize_row(x.data(), columns, {codes.data(), scales.data(), sums.data(), stride, rows, rows - 1});
                for (const float s : scales) sums.push_back(std::int32_t(bits_of(s)));
                for (const std::int8_t c : codes) sums.push_back(c);
                return sums;
            });
        }
        for (const int form : {0, 1, 2, 3})
            with_each("norm_row", [&](const Kernels& k) {
                std::vector<float> y(columns);
                k.norm_row(x.data(), columns, {form % 2 == 0, 1e-5f, form > 0 ? gain.data() : nullptr, form > 1 ? gain.data() : nullptr}, y.data());
                return y;
            });
        for (int kind = 0; kind < 6; ++kind)
            with_each("activate_row", [&](const Kernels& k) {
                std::vector<float> y = x;
                k.activate_row(y.data(), columns, Activation(kind));
                return y;
            });
        with_each("best_of", [&](const Kernels& k) { return std::vector<std::size_t>{k.best_of(x.data(), columns)}; });
    }
}

void attention() {
    std::size_t round = 0;
    for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::int8, CacheType::int4})
        for (const std::size_t depth : {16u, 32u, 48u, 64u})
            for (const std::size_t count : {1u, 2u, 3u, 8u})
                for (const float cap : {0.0f, 5.0f}) {
                    if (type == CacheType::int4 && depth % 32 != 0) continue;
                    const CacheShape shape = {type, 64, depth};
                    const std::size_t kind = ++round % kKinds, seen = 1 + below(64);
                    const std::vector<float> keys = rows_of(kind, seen, depth), values = rows_of((kind + 3) % kKinds, seen, depth);
                    const std::vector<float> queries = rows_of(round % 11 == 0 ? 7 : 0, count, depth);
                    std::vector<std::uint8_t> cache;
                    with_each("append", [&](const Kernels& k) {
                        cache.assign(shape.head_bytes(), 0);
                        for (std::size_t p = 0; p < seen; ++p)
                            k.append({&shape, cache.data()}, p, keys.data() + p * depth, values.data() + p * depth);
                        // Halves that are NaN differ in their bits, so caches of numbers only are compared themselves.
                        return kind == 4 || kind == 7 || (kind + 3) % kKinds == 4 || (kind + 3) % kKinds == 7 ? std::vector<std::uint8_t>() : cache;
                    });
                    with_each("attend", [&](const Kernels& k) {
                        std::vector<float> out(count * depth);
                        Attend a = {{&shape, cache.data()}, count, {}, {}, {}, {}, depth - round % 3, 0.3f, cap};
                        for (std::size_t q = 0; q < count; ++q) {
                            a.queries[q] = queries.data() + q * depth;
                            a.out[q] = out.data() + q * depth;
                            a.last[q] = seen > q ? seen - q : 1;
                            a.first[q] = a.last[q] > 20 ? a.last[q] - 20 : 0;
                        }
                        Memory scratch(k.attend_scratch(depth, 64));
                        k.attend(a, scratch.as());
                        return out;
                    });
                }
}

}  // namespace

int main() {
#ifdef NYBBLE_ARM64
    Operations<neon::Lanes>{"neon"}.all();
    Operations<neondot::Lanes>{"neondot"}.all();
    std::printf("operations: %zu results the same\n", compared);
#endif
    random_bits.seed(11);
    digest = 14695981039346656037u;
    weights();
    std::printf("weights and products: %zu, digest %016llx\n", compared, static_cast<unsigned long long>(digest));
    single_rows();
    std::printf("single rows: %zu, digest %016llx\n", compared, static_cast<unsigned long long>(digest));
    attention();
    std::printf("attention: %zu, digest %016llx; compared:", compared, static_cast<unsigned long long>(digest));
    for (const Kernels* k : usable()) std::printf(" %s", k->name);
    std::printf("\n");
    return 0;
}
