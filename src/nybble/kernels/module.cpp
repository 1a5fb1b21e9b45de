// The Python face of the kernels: picks an instruction set, lays out activations, splits rows over threads.
//
// Private: nybble.kernels checks arguments and words the errors; what is checked again here only keeps a wrong call
// from touching memory that is not its own. Outputs are arrays that the caller made.
#include "kernels.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#ifdef NYBBLE_X86
#include <cpuid.h>
#endif

namespace nb = nanobind;
using namespace nybble;

namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

#ifdef NYBBLE_X86
// The flags of the processor and whether the system saves the wide registers, straight from the machine: the compiler's
// own __builtin_cpu_supports needs a run-time library that not every compiler ships.
struct Machine {
    bool avx2 = false, avx512 = false;
    Machine() {
        unsigned a, b, c, d;
        if (__get_cpuid(1, &a, &b, &c, &d) == 0) return;
        const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
        if (!osxsave || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return;
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
        avx2 = ymm && fma && f16c && (b >> 5 & 1);
        avx512 = avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    }
};
#endif

std::vector<const Kernels*> usable() {  // the best one last
    std::vector<const Kernels*> out = {&kScalar};
#ifdef NYBBLE_X86
    const Machine machine;
    if (machine.avx2) out.push_back(&kAvx2);
    if (machine.avx512) out.push_back(&kAvx512);
#endif
    return out;
}

std::atomic<const Kernels*> active{nullptr};

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> out;
    for (const Kernels* k : usable()) out.emplace_back(k->name);
    return out;
}

void choose(const std::string& name) {
    for (const Kernels* k : usable())
        if (name == k->name) {
            active = k;
            return;
        }
    throw nb::value_error("this machine cannot run that instruction set");
}

void require(bool condition, const char* what) {
    if (!condition) throw nb::value_error(what);
}

// Memory on a cache line, so that vector loads of activations never cross one.
struct Aligned {
    explicit Aligned(std::size_t bytes) : data(::operator new(bytes == 0 ? 64 : bytes, std::align_val_t(64))) {}
    ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    void* data;
};

bool is_half(const Any& a) {
    const nb::dlpack::dtype type = a.dtype();
    require(
        type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && (type.bits == 16 || type.bits == 32),
        "scale and offset must be float16 or float32");
    return type.bits == 16;
}

// The weight and its full table of levels.
struct Bound {
    Weight weight;
    float table[256];
};

void bind(Bound& out, const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
          const Vector<const float>& levels, std::size_t block, const Any& scale, const std::optional<Any>& offset) {
    require(bits >= 1 && bits <= 8 && block >= 1, "bits must be 1 to 8 and block at least 1");
    Weight& w = out.weight;
    w.rows = packed.shape(0);
    w.columns = columns;
    w.bits = bits;
    w.row_bytes = (columns * static_cast<std::size_t>(bits) + 7) / 8;
    w.block = std::max<std::size_t>(1, std::min(block, columns));
    w.blocks = (columns + w.block - 1) / w.block;
    require(packed.shape(1) == w.row_bytes, "packed rows do not have the bytes of their columns");
    require(levels.shape(0) == std::size_t(1) << bits, "levels must have 2**bits values");
    w.packed = packed.data();
    w.packed_end = packed.data() + w.rows * w.row_bytes;

    const auto stride = [&](const Any& a) -> std::size_t {
        if (a.shape(0) == 1 && a.shape(1) == 1 && w.blocks <= 1) return 0;
        require(a.shape(0) == w.rows && a.shape(1) == w.blocks, "scale and offset must be [rows, blocks] or [1, 1]");
        return w.blocks;
    };
    w.scale = scale.data();
    w.scale_half = is_half(scale);
    w.scale_stride = stride(scale);
    w.offset = nullptr;
    w.offset_half = false;
    w.offset_stride = 0;
    if (offset) {
        w.offset = offset->data();
        w.offset_half = is_half(*offset);
        w.offset_stride = stride(*offset);
    }

    const std::size_t count = levels.shape(0);
    for (std::size_t i = 0; i < 256; ++i) out.table[i] = levels.data()[i % count];
    w.levels = out.table;
    const float first = out.table[0];
    w.affine = first == std::floor(first) && std::fabs(first) <= 4194304.0f;
    for (std::size_t i = 0; w.affine && i < count; ++i) w.affine = out.table[i] == first + static_cast<float>(i);
    w.shift = w.affine ? static_cast<std::int32_t>(first) : 0;
}

int threads_for(int threads) {
    require(threads >= 1 && threads <= kMaxThreads, "threads out of range");
    return threads;
}

// Splits rows into fixed chunks of about 64 thousand weights, at least one row; each row's result is its own.
template <class F>
void over_rows(const Weight& w, std::size_t rows, int threads, F task) {
    const std::size_t chunk = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, w.columns));
    const std::size_t chunks = (rows + chunk - 1) / chunk;
    const std::size_t each = (scratch_bytes(w) + 127) / 64 * 64;
    const Aligned scratch(each * static_cast<std::size_t>(threads));
    parallel(chunks, threads, [&](std::size_t c, int worker) {
        task(c * chunk, std::min(rows, (c + 1) * chunk),
             static_cast<char*>(scratch.data) + each * static_cast<std::size_t>(worker));
    });
}

void pack(const Matrix<const std::uint8_t>& codes, const Matrix<std::uint8_t>& packed, int bits) {
    require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    const std::size_t rows = codes.shape(0), columns = codes.shape(1);
    require(packed.shape(0) == rows && packed.shape(1) == (columns * std::size_t(bits) + 7) / 8,
            "packed has the wrong shape");
    nb::gil_scoped_release release;
    kernels().pack(codes.data(), packed.data(), rows, columns, bits);
}

void unpack(const Matrix<const std::uint8_t>& packed, const Matrix<std::uint8_t>& codes, int bits) {
    require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    const std::size_t rows = codes.shape(0), columns = codes.shape(1);
    require(packed.shape(0) == rows && packed.shape(1) == (columns * std::size_t(bits) + 7) / 8,
            "packed has the wrong shape");
    nb::gil_scoped_release release;
    kernels().unpack(packed.data(), codes.data(), rows, columns, bits);
}

void decode(const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits, const Vector<const float>& levels,
            std::size_t block, const Any& scale, const std::optional<Any>& offset, const Matrix<float>& out,
            int threads) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset);
    const Weight& w = bound.weight;
    require(out.shape(0) == w.rows && out.shape(1) == columns, "out has the wrong shape");
    threads = threads_for(threads);
    float* to = out.data();
    nb::gil_scoped_release release;
    const Kernels& run = kernels();
    over_rows(w, w.rows, threads, [&](std::size_t first, std::size_t last, void* scratch) {
        for (std::size_t n = first; n < last; ++n) run.decode_row(w, n, to + n * columns, scratch);
    });
}

void gather(const Vector<const std::int64_t>& rows, const Matrix<const std::uint8_t>& packed, std::size_t columns,
            int bits, const Vector<const float>& levels, std::size_t block, const Any& scale,
            const std::optional<Any>& offset, const Matrix<float>& out) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset);
    const Weight& w = bound.weight;
    require(out.shape(0) == rows.shape(0) && out.shape(1) == columns, "out has the wrong shape");
    for (std::size_t i = 0; i < rows.shape(0); ++i)
        if (rows.data()[i] < 0 || static_cast<std::size_t>(rows.data()[i]) >= w.rows)
            throw nb::index_error("row out of range");
    float* to = out.data();
    nb::gil_scoped_release release;
    const Aligned scratch(scratch_bytes(w));
    for (std::size_t i = 0; i < rows.shape(0); ++i)
        kernels().decode_row(w, static_cast<std::size_t>(rows.data()[i]), to + i * columns, scratch.data);
}

void matmul(const Matrix<const float>& x, const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
            const Vector<const float>& levels, std::size_t block, const Any& scale, const std::optional<Any>& offset,
            const Matrix<float>& y, int threads) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset);
    const Weight& w = bound.weight;
    const std::size_t count = x.shape(0);
    require(x.shape(1) == columns, "x must have as many columns as the weight");
    require(y.shape(0) == count && y.shape(1) == w.rows, "y has the wrong shape");
    threads = threads_for(threads);
    const float* from = x.data();
    float* to = y.data();
    nb::gil_scoped_release release;

    const std::size_t padded = (w.block + kPad - 1) / kPad * kPad;
    const Aligned values(count * w.blocks * padded * sizeof(float));
    const Aligned sums(count * w.blocks * sizeof(float));
    auto* laid = static_cast<float*>(values.data);
    auto* totals = static_cast<float*>(sums.data);
    for (std::size_t i = 0; i < count * w.blocks; ++i, laid += padded) {
        const std::size_t m = i / w.blocks, begin = (i % w.blocks) * w.block;
        const std::size_t length = std::min(w.block, columns - begin);
        std::copy_n(from + m * columns + begin, length, laid);
        std::fill(laid + length, laid + padded, 0.0f);
        double total = 0.0;
        if (w.offset != nullptr)
            for (std::size_t k = 0; k < length; ++k) total += static_cast<double>(laid[k]);
        totals[i] = static_cast<float>(total);
    }
    const Activations laid_out = {static_cast<const float*>(values.data), totals, count, padded};
    const Kernels& run = kernels();
    over_rows(w, w.rows, threads, [&](std::size_t first, std::size_t last, void* scratch) {
        run.matmul(w, laid_out, to, first, last, scratch);
    });
}

double read_bandwidth(std::size_t bytes, int threads, int repeats) {
    constexpr std::size_t piece = std::size_t(1) << 20;
    require(bytes >= 8 && repeats >= 1, "bytes must be at least 8 and repeats at least 1");
    threads = threads_for(threads);
    nb::gil_scoped_release release;
    const std::size_t words = bytes / 8, step = piece / 8, pieces = (words + step - 1) / step;
    const Aligned buffer(words * 8);
    auto* data = static_cast<std::uint64_t*>(buffer.data);
    parallel(pieces, threads, [&](std::size_t p, int) {
        for (std::size_t i = p * step; i < std::min(words, (p + 1) * step); ++i) data[i] = i;
    });
    const Kernels& run = kernels();
    std::atomic<std::uint64_t> total{0};  // uses the sums, so that no compiler drops the reads
    double best = 0.0;
    for (int r = 0; r < repeats; ++r) {
        const auto start = std::chrono::steady_clock::now();
        parallel(pieces, threads, [&](std::size_t p, int) {
            total.fetch_add(run.sum(data + p * step, std::min(words, (p + 1) * step) - p * step),
                            std::memory_order_relaxed);
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds > 0.0) best = std::max(best, static_cast<double>(words * 8) / seconds);
    }
    const std::uint64_t n = words;
    const std::uint64_t once = (n % 2 == 0) ? (n / 2) * (n - 1) : n * ((n - 1) / 2);
    if (total.load() != once * static_cast<std::uint64_t>(repeats))
        throw std::runtime_error("the buffer read back differs from what was written");
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "C++ kernels of nybble; use nybble.kernels, which checks arguments.";
    active = usable().back();
    m.def("instruction_sets", &instruction_sets);
    m.def("instruction_set", [] { return std::string(kernels().name); });
    m.def("select", &choose, nb::arg("name"));
    m.def("pack", &pack, nb::arg("codes").noconvert(), nb::arg("packed").noconvert(), nb::arg("bits"));
    m.def("unpack", &unpack, nb::arg("packed").noconvert(), nb::arg("codes").noconvert(), nb::arg("bits"));
    m.def("decode", &decode, nb::arg("packed").noconvert(), nb::arg("columns"), nb::arg("bits"),
          nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("offset").noconvert().none(), nb::arg("out").noconvert(), nb::arg("threads"));
    m.def("gather", &gather, nb::arg("rows").noconvert(), nb::arg("packed").noconvert(), nb::arg("columns"),
          nb::arg("bits"), nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("offset").noconvert().none(), nb::arg("out").noconvert());
    m.def("matmul", &matmul, nb::arg("x").noconvert(), nb::arg("packed").noconvert(), nb::arg("columns"),
          nb::arg("bits"), nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("offset").noconvert().none(), nb::arg("y").noconvert(), nb::arg("threads"));
    m.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"), nb::arg("repeats"));
}
