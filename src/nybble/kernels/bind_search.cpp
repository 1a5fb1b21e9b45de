// The Python face of what chooses codes: the search for scales, rounding to the nearest level, rounding as ggml does it, whole steps.
#include "bind.hpp"
#include "cpu.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

namespace nybble {
namespace {

Levels levels_of(const Vector<const float>& levels) {
    const std::size_t count = levels.shape(0);
    require(count >= 2 && count <= 256, "levels must be 2 to 256");
    Levels out;
    out.lowest = levels.data()[0];
    out.highest = levels.data()[count - 1];
    out.whole = out.lowest == std::floor(out.lowest) && std::fabs(out.lowest) <= 4194304.0f;
    for (std::size_t i = 1; i < count; ++i) out.whole = out.whole && levels.data()[i] - levels.data()[i - 1] == 1.0f;
    require(out.whole || count <= 16, "a table has at most 16 levels");
    for (std::size_t i = 0; i < 16; ++i) {
        out.at[i] = levels.data()[std::min(i, count - 1)];
        out.between[i] = i + 1 < count && !out.whole ? (levels.data()[i + 1] + levels.data()[i]) * 0.5f
                                                     : std::numeric_limits<float>::infinity();
    }
    return out;
}

void search(const Matrix<const float>& weight, const std::optional<Matrix<const float>>& importance, const Vector<const float>& levels,
            std::size_t block, std::size_t run, int low, int high, bool shifted, std::size_t plains, const Matrix<const float>& tries,
            const Vector<const float>& dividers, const Matrix<std::uint8_t>& codes, const Matrix<std::uint16_t>& d,
            const Matrix<std::int8_t>& m, const std::optional<Matrix<std::uint16_t>>& dmin, const std::optional<Matrix<std::int8_t>>& n,
            int threads) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1);
    require(block >= 1 && run >= block && run % block == 0 && run / block <= 16 && run <= 256 && columns % run == 0,
            "runs must be at most 16 whole blocks, 256 columns, and divide a row");
    require(low >= -128 && low <= high && high <= 127, "multipliers must be signed bytes");
    require(plains >= 1 && tries.shape(0) >= plains && tries.shape(1) == 2 && dividers.shape(0) >= 1, "tries or dividers are missing");
    const auto fits = [&](const auto& a, std::size_t width) { return a.shape(0) == rows && a.shape(1) == columns / width; };
    require(fits(codes, 1) && fits(d, run) && fits(m, block), "an output has the wrong shape");
    require(dmin.has_value() == shifted && n.has_value() == shifted, "dmin and n belong to shifted levels");
    require(!shifted || (fits(*dmin, run) && fits(*n, block)), "an output has the wrong shape");
    const bool every_row = importance && importance->shape(0) == rows;
    require(!importance || (importance->shape(1) == columns && (every_row || importance->shape(0) == 1)), "importance has the wrong shape");
    threads = threads_for(threads);
    Search how;
    how.levels = levels_of(levels);
    require(how.levels.whole || !shifted, "shifted levels must be whole");
    how.block = block;
    how.blocks = run / block;
    how.low = static_cast<float>(low);
    how.high = static_cast<float>(high);
    how.shifted = shifted;
    how.plains = plains;
    how.tries = tries.data();
    how.tries_count = tries.shape(0);
    how.dividers = dividers.data();
    how.dividers_count = dividers.shape(0);
    const float* from = weight.data();
    const float* important = importance ? importance->data() : nullptr;
    std::uint8_t* to = codes.data();
    std::uint16_t *d_to = d.data(), *dmin_to = shifted ? dmin->data() : nullptr;
    std::int8_t *m_to = m.data(), *n_to = shifted ? n->data() : nullptr;
    const std::size_t runs = rows * (columns / run), across = columns / run;
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    constexpr std::size_t group = 16;  // sixteens that a thread takes at once
    const std::size_t sixteens = (runs + 15) / 16;
    parallel((sixteens + group - 1) / group, threads, [&](std::size_t chunk, int) {
        std::uint16_t halves[2][16];
        std::int8_t multipliers[2][16 * 16];
        SixteenRuns sixteen;
        sixteen.d = halves[0];
        sixteen.dmin = halves[1];
        sixteen.m = multipliers[0];
        sixteen.n = multipliers[1];
        for (std::size_t s = chunk * group; s < std::min(sixteens, (chunk + 1) * group); ++s) {
            for (std::size_t lane = 0; lane < 16; ++lane) {
                const std::size_t at = std::min(s * 16 + lane, runs - 1);
                sixteen.weight[lane] = from + at * run;
                sixteen.importance[lane] = important == nullptr ? nullptr : important + (every_row ? at : at % across) * run;
                sixteen.codes[lane] = s * 16 + lane < runs ? to + at * run : nullptr;
            }
            kernel.search_runs(how, sixteen);
            for (std::size_t lane = 0; lane < 16 && s * 16 + lane < runs; ++lane) {
                const std::size_t at = s * 16 + lane;
                d_to[at] = halves[0][lane];
                if (shifted) dmin_to[at] = halves[1][lane];
                for (std::size_t b = 0; b < how.blocks; ++b) {
                    m_to[at * how.blocks + b] = multipliers[0][16 * b + lane];
                    if (shifted) n_to[at * how.blocks + b] = multipliers[1][16 * b + lane];
                }
            }
        }
    });
}

void nearest(const Matrix<const float>& weight, const Vector<const float>& levels, std::size_t block, const Matrix<const float>& scale,
             const std::optional<Matrix<const float>>& offset, const Matrix<std::uint8_t>& codes, int threads) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1);
    require(block >= 1, "block must be at least 1");
    const std::size_t blocks = (columns + block - 1) / block;
    const auto fits = [&](const auto& a, std::size_t width) { return a.shape(0) == rows && a.shape(1) == width; };
    require(fits(codes, columns) && fits(scale, blocks) && (!offset || fits(*offset, blocks)), "an array has the wrong shape");
    threads = threads_for(threads);
    const Levels table = levels_of(levels);
    const float *from = weight.data(), *scales = scale.data(), *offsets = offset ? offset->data() : nullptr;
    std::uint8_t* to = codes.data();
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    const std::size_t group = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, columns));
    parallel((rows + group - 1) / group, threads, [&](std::size_t chunk, int) {
        for (std::size_t row = chunk * group; row < std::min(rows, (chunk + 1) * group); ++row)
            kernel.nearest_row(table, from + row * columns, columns, block, scales + row * blocks,
                               offsets == nullptr ? nullptr : offsets + row * blocks, to + row * columns);
    });
}

void round_blocks(const Matrix<const float>& weight, int bits, std::size_t block, const std::string& rule,
                  const Matrix<std::uint8_t>& codes, const Matrix<float>& scale, const Matrix<float>& shift, int threads) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1);
    require(bits >= 2 && bits <= 8 && block >= 1 && block <= 256 && columns % block == 0, "blocks must divide a row");
    require(rule == "range" || rule == "ends" || rule == "away", "rule must be range, ends or away");
    const auto fits = [&](const auto& a, std::size_t width) { return a.shape(0) == rows && a.shape(1) == width; };
    require(fits(codes, columns) && fits(scale, columns / block) && fits(shift, columns / block), "an output has the wrong shape");
    threads = threads_for(threads);
    const RoundBy by = rule == "range" ? RoundBy::range : rule == "ends" ? RoundBy::ends : RoundBy::away;
    const float* from = weight.data();
    std::uint8_t* to = codes.data();
    float *scales = scale.data(), *shifts = shift.data();
    const std::size_t blocks = rows * (columns / block);
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    constexpr std::size_t group = 2048;  // blocks that a thread takes at once
    parallel((blocks + group - 1) / group, threads, [&](std::size_t chunk, int) {
        float values[2][16];
        for (std::size_t b = chunk * group; b < std::min(blocks, (chunk + 1) * group); b += 16) {
            SixteenBlocks sixteen;
            sixteen.scale = values[0];
            sixteen.shift = values[1];
            sixteen.block = block;
            sixteen.bits = bits;
            const std::size_t count = std::min<std::size_t>(16, blocks - b);
            for (std::size_t lane = 0; lane < 16; ++lane) {
                const std::size_t at = b + std::min(lane, count - 1);
                sixteen.weight[lane] = from + at * block;
                sixteen.codes[lane] = lane < count ? to + at * block : nullptr;
            }
            kernel.round_sixteen(sixteen, by);
            std::copy_n(values[0], count, scales + b);
            std::copy_n(values[1], count, shifts + b);
        }
    });
}

void extremes(const Matrix<const float>& weight, std::size_t block, const Matrix<float>& low, const Matrix<float>& high, int threads) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1);
    require(block >= 1, "block must be at least 1");
    const std::size_t blocks = (columns + block - 1) / block;
    const auto fits = [&](const auto& a) { return a.shape(0) == rows && a.shape(1) == blocks; };
    require(fits(low) && fits(high), "an output has the wrong shape");
    threads = threads_for(threads);
    const float* from = weight.data();
    float *lows = low.data(), *highs = high.data();
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    const std::size_t group = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, columns));
    parallel((rows + group - 1) / group, threads, [&](std::size_t chunk, int) {
        for (std::size_t row = chunk * group; row < std::min(rows, (chunk + 1) * group); ++row)
            kernel.extremes_row(from + row * columns, columns, block, lows + row * blocks, highs + row * blocks);
    });
}

void uniform(const Matrix<const float>& weight, int bits, std::size_t block, const Matrix<const float>& scale,
             const std::optional<Matrix<const float>>& zero, const Matrix<std::uint8_t>& codes, int threads) {
    const std::size_t rows = weight.shape(0), columns = weight.shape(1);
    require(bits >= 2 && bits <= 8 && block >= 1, "bits must be 2 to 8, block at least 1");
    const std::size_t blocks = (columns + block - 1) / block;
    const auto fits = [&](const auto& a, std::size_t width) { return a.shape(0) == rows && a.shape(1) == width; };
    require(fits(codes, columns) && fits(scale, blocks) && (!zero || fits(*zero, blocks)), "an array has the wrong shape");
    threads = threads_for(threads);
    const float *from = weight.data(), *scales = scale.data(), *zeros = zero ? zero->data() : nullptr;
    std::uint8_t* to = codes.data();
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    const std::size_t group = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, columns));
    parallel((rows + group - 1) / group, threads, [&](std::size_t chunk, int) {
        for (std::size_t row = chunk * group; row < std::min(rows, (chunk + 1) * group); ++row)
            kernel.uniform_row(from + row * columns, columns, block, scales + row * blocks,
                               zeros == nullptr ? nullptr : zeros + row * blocks, double(1 << (bits - 1)), double((1 << bits) - 1),
                               to + row * columns);
    });
}

bool round_uniform(const Any& values, const std::string& kind, int bits, std::size_t block, const Matrix<std::uint8_t>& codes,
                   const std::optional<Matrix<std::uint16_t>>& halves, const std::optional<Matrix<float>>& scale,
                   const std::optional<Matrix<std::uint8_t>>& zero, int threads) {
    require(kind == "f32" || kind == "f16" || kind == "bf16", "kind must be f32, f16 or bf16");
    const std::size_t width = kind == "f32" ? 4 : 2, rows = values.shape(0), columns = values.shape(1);
    require(values.dtype().bits == 8 * width && values.dtype().lanes == 1, "values have another width");
    require(bits >= 2 && bits <= 8 && block >= 1, "bits must be 2 to 8, block at least 1");
    const std::size_t blocks = (columns + block - 1) / block;
    const auto fits = [&](const auto& a, std::size_t count) { return a.shape(0) == rows && a.shape(1) == count; };
    require(halves.has_value() != scale.has_value(), "scales are halves or floats");
    require(fits(codes, columns) && (!halves || fits(*halves, blocks)) && (!scale || fits(*scale, blocks)) && (!zero || fits(*zero, blocks)),
            "an output has the wrong shape");
    threads = threads_for(threads);
    RoundRow all{};
    all.holds = kind == "f32" ? Holds::f32 : kind == "f16" ? Holds::f16 : Holds::bf16;
    all.columns = columns;
    all.block = block;
    all.bits = bits;
    const auto* from = static_cast<const std::uint8_t*>(values.data());
    std::uint8_t *to = codes.data(), *zeros = zero ? zero->data() : nullptr;
    std::uint16_t* small = halves ? halves->data() : nullptr;
    float* wide = scale ? scale->data() : nullptr;
    std::atomic<bool> fine{true};
    nb::gil_scoped_release release;
    const Kernels& kernel = kernels();
    const std::size_t group = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, columns));
    parallel((rows + group - 1) / group, threads, [&](std::size_t chunk, int) {
        std::vector<float> floats(all.holds == Holds::f32 ? 0 : columns);
        for (std::size_t row = chunk * group; row < std::min(rows, (chunk + 1) * group) && fine; ++row) {
            RoundRow one = all;
            one.from = from + row * columns * width;
            one.floats = floats.data();
            one.codes = to + row * columns;
            one.halves = small == nullptr ? nullptr : small + row * blocks;
            one.scale = wide == nullptr ? nullptr : wide + row * blocks;
            one.zero = zeros == nullptr ? nullptr : zeros + row * blocks;
            if (!kernel.round_row(one)) fine = false;
        }
    });
    return fine;
}

}  // namespace

void bind_search(nb::module_& m) {
    m.def("search", &search, nb::arg("weight").noconvert(), nb::arg("importance").noconvert().none(), nb::arg("levels").noconvert(),
          nb::arg("block"), nb::arg("run"), nb::arg("low"), nb::arg("high"), nb::arg("shifted"), nb::arg("plains"), nb::arg("tries").noconvert(),
          nb::arg("dividers").noconvert(), nb::arg("codes").noconvert(), nb::arg("d").noconvert(), nb::arg("m").noconvert(),
          nb::arg("dmin").noconvert().none(), nb::arg("n").noconvert().none(), nb::arg("threads"));
    m.def("nearest", &nearest, nb::arg("weight").noconvert(), nb::arg("levels").noconvert(), nb::arg("block"),
          nb::arg("scale").noconvert(), nb::arg("offset").noconvert().none(), nb::arg("codes").noconvert(), nb::arg("threads"));
    m.def("extremes", &extremes, nb::arg("weight").noconvert(), nb::arg("block"), nb::arg("low").noconvert(),
          nb::arg("high").noconvert(), nb::arg("threads"));
    m.def("uniform", &uniform, nb::arg("weight").noconvert(), nb::arg("bits"), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("zero").noconvert().none(), nb::arg("codes").noconvert(), nb::arg("threads"));
    m.def("round_uniform", &round_uniform, nb::arg("values").noconvert(), nb::arg("kind"), nb::arg("bits"), nb::arg("block"),
          nb::arg("codes").noconvert(), nb::arg("halves").noconvert().none(), nb::arg("scale").noconvert().none(),
          nb::arg("zero").noconvert().none(), nb::arg("threads"));
    m.def("round_blocks", &round_blocks, nb::arg("weight").noconvert(), nb::arg("bits"), nb::arg("block"), nb::arg("rule"),
          nb::arg("codes").noconvert(), nb::arg("scale").noconvert(), nb::arg("shift").noconvert(), nb::arg("threads"));
}

}  // namespace nybble
