// Compares NEON with plain C++, to the bit: every operation on sixteen lanes (neon_operations.cpp), then every kernel, with
// random and with hostile numbers. It needs no ARM machine, only a cross compiler and an emulator of its programs:
//
//     aarch64-linux-gnu-g++ -std=c++20 -O1 -ffp-contract=off -march=armv8.2-a+dotprod -DNYBBLE_ARM64 -static -pthread
//         -o build/neon tests/native/neon*.cpp src/nybble/kernels/{weight,cpu,threads}.cpp
//     qemu-aarch64-static build/neon
//
// The digest it ends with covers all results of plain C++, any NaN counted as one. Built on another machine without -march and
// -DNYBBLE_ARM64 the same digest must come out.
#include "../../src/nybble/kernels/weight.hpp"
#include "compare.hpp"

using namespace nybble;

namespace {

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
    const Activations laid = {count, stride, values.data(), codes.data(), scale.data(), sums.data()};
    if (fast) k.prepare(w, laid, scratch.as());
    k.product(w, laid, to, 0, w.tiles, fast, scratch.as());
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
                const float *by = form > 0 ? gain.data() : nullptr, *plus = form > 1 ? gain.data() : nullptr;
                k.norm_row(x.data(), columns, {form % 2 == 0, 1e-5f, by, plus}, y.data());
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
    for (const CacheType type : {CacheType::f32, CacheType::f16, CacheType::int16, CacheType::int8, CacheType::int4})
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
                        const bool numbers = kind != 4 && kind != 7 && (kind + 3) % kKinds != 4 && (kind + 3) % kKinds != 7;
                        return numbers ? cache : std::vector<std::uint8_t>();
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
    operations();
    std::printf("operations: %zu results the same\n", compared);
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
