#include "weight.hpp"

#include "cpu.hpp"
#include "threads.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace nybble {
namespace {

constexpr std::int32_t kFar = 1 << 16;  // levels from here on would leave 32 bits when they are summed
constexpr std::size_t kMapped = std::size_t(1) << 18;  // bytes from which memory is mapped
constexpr std::size_t kHuge = std::size_t(2) << 20;    // bytes of a huge page
constexpr std::size_t kSlab = 16 * kHuge;
constexpr std::size_t kGroup = std::size_t(1) << 16;   // bytes of tiles that a thread lays out at a time
constexpr std::size_t kTogether = 16;                  // groups whose pages are given back together
constexpr std::size_t kShared = std::size_t(1) << 16;  // bytes from which memory may come from a slab

void give_back(const void* from, std::size_t bytes) {
#if defined(__linux__)
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto start = reinterpret_cast<std::uintptr_t>(from);
    const std::uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
    (void)from;
    (void)bytes;
#endif
}

// [rows, blocks] (or one value for all) to [tiles][blocks][16].
template <class T>
void lay_parameters(const T* from, std::size_t stride, const Tiled& w, std::size_t blocks, T* to) {
    for (std::size_t t = 0; t < w.tiles; ++t)
        for (std::size_t b = 0; b < blocks; ++b, to += kRows)
            for (std::size_t r = 0; r < kRows && t * kRows + r < w.rows; ++r)
                to[r] = from[stride == 0 ? 0 : (t * kRows + r) * stride + b];
}

template <class T>
void restore_parameters(const T* from, const Tiled& w, std::size_t rows, T* to) {
    for (std::size_t n = 0; n < rows; ++n)
        for (std::size_t b = 0; b < w.blocks; ++b) to[n * w.blocks + b] = from[((n / kRows) * w.blocks + b) * kRows + n % kRows];
}

// Steps of whole scales, for weights whose sums of a block of activations fit them (body_product.hpp): symmetric levels of up to
// four bits, more than one scale in 64 columns, and none that is not finite or far from one.
Memory whole_steps(const Tiled& w) {
    const std::int32_t last = (1 << w.bits) - 1 - w.base;
    if (w.part == kBlock || w.table || w.offset != nullptr || std::max(std::abs(w.base), std::abs(last)) > 8) return {};
    Memory steps(w.tiles * kRows);
    float tops[kRows];
    for (std::size_t t = 0; t < w.tiles; ++t) {
        kernels().largest_scales(w, t, tops);
        for (std::size_t r = 0; r < kRows; ++r) {
            int exponent = 15;
            if (tops[r] != 0.0f) {
                if (!(tops[r] >= 0x1p-90f && tops[r] <= 0x1p90f)) return {};
                std::frexp(tops[r], &exponent);  // the largest scale is 2**14 to 2**15 steps
                if (std::nearbyint(std::ldexp(tops[r], 15 - exponent)) > 32767.0f) ++exponent;
            }
            steps.as()[t * kRows + r] = std::uint8_t(127 + exponent - 15);
        }
    }
    return steps;
}

// The table as bytes: the step of whole numbers that comes nearest to the levels.
void byte_levels(Tiled& w) {
    double top = 0.0;
    for (const float level : w.levels) top = std::max(top, std::fabs(double(level)));
    if (top == 0.0) top = 1.0;
    double best = -1.0, steps = 127.0;
    for (int i = 0; i <= 1270; ++i) {
        const double n = 127.0 - i * 0.05;  // steps from zero to the largest level
        double error = 0.0;
        for (const float level : w.levels) {
            const double at = double(level) / top * n, off = (at - std::nearbyint(at)) / n;
            error += off * off;
        }
        if (best < 0.0 || error < best - 1e-18) best = error, steps = n;
    }
    for (int i = 0; i < 16; ++i) w.bytes[i] = std::uint8_t(int(std::nearbyint(double(w.levels[i]) / top * steps)) + 128);
    w.byte_step = static_cast<float>(top / steps);
}

#if defined(__linux__)
// Most matrices of a model are smaller than a huge page or lie across the ends of two, so that mapped alone they would get
// small pages. In slabs that begin with a page they fill it together.
struct Slab {
    std::uint8_t* base;
    std::size_t used = 0;
    Slab() {
        void* got = mmap(nullptr, kSlab + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        auto* begin = static_cast<std::uint8_t*>(got);
        const std::size_t before = (kHuge - reinterpret_cast<std::uintptr_t>(got) % kHuge) % kHuge;
        if (before != 0) munmap(begin, before);
        base = begin + before;
        munmap(base + kSlab, kHuge - before);
        madvise(base, kSlab, MADV_HUGEPAGE);
    }
    ~Slab() { munmap(base, kSlab); }
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;
};

std::uint8_t* from_slab(std::size_t bytes, std::shared_ptr<void>& owner) {
    static std::mutex lock;
    static std::weak_ptr<Slab> current;
    const std::lock_guard held(lock);
    std::shared_ptr<Slab> slab = current.lock();
    if (slab == nullptr || kSlab - slab->used < bytes) current = slab = std::make_shared<Slab>();
    std::uint8_t* data = slab->base + slab->used;
    slab->used += std::min(kSlab - slab->used, (bytes + 63) / 64 * 64);
    owner = slab;
    return data;
}
#endif

}  // namespace

Memory::Memory(std::size_t bytes, [[maybe_unused]] bool huge) : bytes_(bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    if (huge && bytes >= kShared && bytes <= kSlab / 2) {
        data_ = from_slab(bytes, slab_);
        return;
    }
#endif
#if defined(__unix__) || defined(__APPLE__)
    if (bytes >= kMapped) {
        void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
#if defined(__linux__)
        madvise(got, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
        data_ = static_cast<std::uint8_t*>(got);
        mapped_ = true;
        return;
    }
#endif
    data_ = static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t(64)));
    std::memset(data_, 0, bytes);
}

Memory::~Memory() {
    if (data_ == nullptr) return;
    if (slab_ != nullptr) {  // others may hold the slab for long: whole pages need not wait for them
        give_back(data_, bytes_);
        return;
    }
#if defined(__unix__) || defined(__APPLE__)
    if (mapped_) {
        munmap(data_, bytes_);
        return;
    }
#endif
    ::operator delete(data_, std::align_val_t(64));
}

Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }

Memory& Memory::operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(slab_, other.slab_);
    return *this;
}

LaidWeight::LaidWeight(const Weight& source, bool drop, int threads, const NestedSource* nested) {
    const Kernels& run = kernels();
    Tiled& w = tiled;
    w.rows = source.rows;
    w.columns = source.columns;
    w.tiles = (w.rows + kRows - 1) / kRows;
    w.units = (w.columns + kUnit - 1) / kUnit;
    w.block = source.block;
    w.blocks = source.blocks;
    w.bits = source.bits;
    w.part = w.blocks <= 1 || w.block % kBlock == 0 ? kBlock : w.block == kUnit / 2 ? kUnit / 2 : kUnit;
    const bool fits = (w.blocks <= 1 || w.block % w.part == 0) && source.bits >= 2;
    w.table = !source.affine;
    // The products know whole numbers of 2 to 8 bits and tables of sixteen levels without offsets.
    const bool near = source.shift >= -kFar && source.shift <= kFar;
    const bool readable = fits && ((source.affine && near) || (!source.affine && source.bits == 4 && source.offset == nullptr));
    const std::size_t shared = source.scale_stride == 0 ? 1 : w.rows;
    parameter_rows = shared;
    if (nested != nullptr && !readable) throw std::invalid_argument("nested scales need levels and blocks that kernels know");
    if (!readable) {  // blocks or levels that no kernel knows: decoded once, correct and large
        w.holds = Holds::f32;
        w.tile_bytes = w.columns * kRows * sizeof(float);
        data_ = Memory(w.tiles * w.tile_bytes, true);
        w.data = data_.as();
        const std::size_t each = (scratch_bytes(source) + 127) / 64 * 64;
        Memory scratch(each * std::size_t(threads));
        Memory lines(std::size_t(threads) * (w.columns * sizeof(float) + 64));
        parallel(w.tiles, threads, [&](std::size_t t, int worker) {
            auto* to = reinterpret_cast<float*>(data_.as() + t * w.tile_bytes);
            auto* row = reinterpret_cast<float*>(lines.as() + std::size_t(worker) * (w.columns * sizeof(float) + 64));
            for (std::size_t r = 0; r < kRows && t * kRows + r < w.rows; ++r) {
                run.decode_row(source, t * kRows + r, row, scratch.as() + std::size_t(worker) * each);
                for (std::size_t k = 0; k < w.columns; ++k) to[k * kRows + r] = row[k];
            }
        });
        return;
    }
    w.base = -source.shift;
    for (std::size_t i = 0; i < 16; ++i) w.levels[i] = source.levels[i];
    if (w.table) byte_levels(w);
    w.tile_bytes = w.units * kLine * std::size_t(w.bits);
    data_ = Memory(w.tiles * w.tile_bytes, true);
    w.data = data_.as();
    const std::size_t padded_bytes = kRows * w.units * kUnit;
    const std::size_t group = std::max<std::size_t>(1, kGroup / std::max<std::size_t>(1, w.tile_bytes));
    Memory scratch(padded_bytes * std::size_t(threads));
    parallel((w.tiles + group - 1) / group, threads, [&](std::size_t g, int worker) {
        const std::uint8_t* rows[kRows];
        std::uint8_t* mine = scratch.as() + padded_bytes * std::size_t(worker);
        const std::size_t end = std::min(w.tiles, (g + 1) * group);
        for (std::size_t t = g * group; t < end; ++t) {
            for (std::size_t r = 0; r < kRows; ++r)
                rows[r] = t * kRows + r < w.rows ? source.packed + (t * kRows + r) * source.row_bytes : nullptr;
            run.tile_codes(rows, w.columns, w.units, w.bits, data_.as() + t * w.tile_bytes, mine);
        }
        // A megabyte at a time: each call interrupts the other threads. What one of them still reads there comes back.
        if (drop && ((g + 1) % kTogether == 0 || end == w.tiles)) {
            const std::size_t from = g / kTogether * kTogether * group * kRows;
            give_back(source.packed + from * source.row_bytes, (std::min(w.rows, end * kRows) - from) * source.row_bytes);
        }
    });
    const auto lay = [&](const void* from, bool half, std::size_t stride, Memory& to) {
        to = Memory(w.tiles * std::max<std::size_t>(1, w.blocks) * kRows * (half ? 2 : 4), true);
        if (half)
            lay_parameters(static_cast<const std::uint16_t*>(from), stride, w, w.blocks, to.as<std::uint16_t>());
        else
            lay_parameters(static_cast<const float*>(from), stride, w, w.blocks, to.as<float>());
        if (drop) give_back(from, (stride == 0 ? 1 : w.rows * stride) * (half ? 2 : 4));
    };
    if (nested != nullptr) {
        const auto inner = [&](const NestedSource& from, Memory& codes, Memory& outer, Nested& to) {
            to.bias = from.bias;
            to.count = w.blocks / from.per;
            while ((std::size_t(1) << to.shift) < from.per) ++to.shift;
            codes = Memory(w.tiles * w.blocks * kRows, true);
            lay_parameters(from.codes, w.blocks, w, w.blocks, codes.as());
            outer = Memory(w.tiles * to.count * kRows * 2, true);
            lay_parameters(from.outer, to.count, w, to.count, outer.as<std::uint16_t>());
            to.codes = codes.as();
            to.outer = outer.as<std::uint16_t>();
        };
        inner(nested[0], scale_, outer_[0], w.nested_scale);
        w.scale = scale_.as();
        if (nested[1].codes != nullptr) {
            inner(nested[1], offset_, outer_[1], w.nested_offset);
            w.offset = offset_.as();
        }
        steps_ = whole_steps(w);
        w.steps = steps_.as();
        return;
    }
    w.scale_half = source.scale_half;
    lay(source.scale, source.scale_half, source.scale_stride, scale_);
    w.scale = scale_.as();
    if (source.offset != nullptr) {
        w.offset_half = source.offset_half;
        w.offset_is_zero = !source.shifted;
        lay(source.offset, source.offset_half, source.offset_stride, offset_);
        w.offset = offset_.as();
    }
    steps_ = whole_steps(w);
    w.steps = steps_.as();
}

LaidWeight::LaidWeight(const FloatSource& source, bool drop, int threads) {
    Tiled& w = tiled;
    w.holds = source.holds;
    w.rows = source.rows;
    w.columns = source.columns;
    w.tiles = (w.rows + kRows - 1) / kRows;
    w.units = (w.columns + kUnit - 1) / kUnit;
    const std::size_t size = w.holds == Holds::f32 ? 4 : 2;
    w.bits = int(size) * 8;
    w.tile_bytes = w.columns * kRows * size;
    data_ = Memory(w.tiles * w.tile_bytes, true);
    w.data = data_.as();
    const auto* from = static_cast<const std::uint8_t*>(source.values);
    const auto tile = [&]<class T>(const T* values, std::size_t t) {
        T* to = reinterpret_cast<T*>(data_.as() + t * w.tile_bytes);
        const std::size_t first = t * kRows, count = std::min(kRows, w.rows - first);
        if (source.transposed) {
            for (std::size_t k = 0; k < w.columns; ++k) std::memcpy(to + k * kRows, values + k * w.rows + first, count * sizeof(T));
            return;
        }
        for (std::size_t r = 0; r < count; ++r) {
            const T* row = values + (first + r) * w.columns;
            for (std::size_t k = 0; k < w.columns; ++k) to[k * kRows + r] = row[k];
        }
    };
    parallel(w.tiles, threads, [&](std::size_t t, int) {
        if (size == 4)
            tile(reinterpret_cast<const std::uint32_t*>(from), t);
        else
            tile(reinterpret_cast<const std::uint16_t*>(from), t);
        if (drop && !source.transposed)
            give_back(from + t * kRows * w.columns * size, std::min(kRows, w.rows - t * kRows) * w.columns * size);
    });
    if (drop && source.transposed) give_back(from, w.rows * w.columns * size);
}

void LaidWeight::restore(std::uint8_t* packed, void* scale, void* offset, int threads) const {
    const Kernels& run = kernels();
    const Tiled& w = tiled;
    const std::size_t row_bytes = (w.columns * std::size_t(w.bits) + 7) / 8;
    Memory scratch(kRows * w.columns * std::size_t(threads) + 64);
    parallel(w.tiles, threads, [&](std::size_t t, int worker) {
        std::uint8_t* codes = scratch.as() + kRows * w.columns * std::size_t(worker);
        run.untile_codes(w, t, codes);
        run.pack(codes, packed + t * kRows * row_bytes, std::min(kRows, w.rows - t * kRows), w.columns, w.bits);
    });
    const auto back = [&](const Memory& from, bool half, void* to) {
        if (half)
            restore_parameters(from.as<const std::uint16_t>(), w, parameter_rows, static_cast<std::uint16_t*>(to));
        else
            restore_parameters(from.as<const float>(), w, parameter_rows, static_cast<float*>(to));
    };
    if (w.nested_scale.codes != nullptr) return;
    back(scale_, w.scale_half, scale);
    if (w.offset != nullptr) back(offset_, w.offset_half, offset);
}

std::vector<float> padded(const float* from, std::size_t count, std::size_t to) {
    std::vector<float> out(std::max(count, to), 0.0f);
    std::copy_n(from, count, out.begin());
    return out;
}

}  // namespace nybble
