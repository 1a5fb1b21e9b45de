// Arrays from Python, checked. nybble.kernels words the errors; what is checked again here only keeps a wrong call from
// touching memory that is not its own.
#pragma once

#include "kernels.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <optional>

namespace nb = nanobind;

namespace nybble {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const char* what) {
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

inline bool is_half(const Any& a) {
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

// The codes and levels alone.
inline void bind_codes(Bound& out, const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
                       const Vector<const float>& levels, std::size_t block) {
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
    w.scale = w.offset = nullptr;
    w.scale_half = w.offset_half = w.shifted = false;
    w.scale_stride = w.offset_stride = w.blocks;

    const std::size_t count = levels.shape(0);
    for (std::size_t i = 0; i < 256; ++i) out.table[i] = levels.data()[i % count];
    w.levels = out.table;
    const float first = out.table[0];
    w.affine = first == std::floor(first) && std::fabs(first) <= 4194304.0f;
    for (std::size_t i = 0; w.affine && i < count; ++i) w.affine = out.table[i] == first + static_cast<float>(i);
    w.shift = w.affine ? static_cast<std::int32_t>(first) : 0;
}

inline void bind(Bound& out, const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
                 const Vector<const float>& levels, std::size_t block, const Any& scale, const std::optional<Any>& offset,
                 bool shifted) {
    bind_codes(out, packed, columns, bits, levels, block);
    Weight& w = out.weight;
    const auto stride = [&](const Any& a) -> std::size_t {
        if (a.shape(0) == 1 && a.shape(1) == 1 && w.blocks <= 1) return 0;
        require(a.shape(0) == w.rows && a.shape(1) == w.blocks, "scale and offset must be [rows, blocks] or [1, 1]");
        return w.blocks;
    };
    w.scale = scale.data();
    w.scale_half = is_half(scale);
    w.scale_stride = stride(scale);
    w.shifted = shifted && offset.has_value();
    if (offset) {
        w.offset = offset->data();
        w.offset_half = is_half(*offset);
        w.offset_stride = stride(*offset);
    }
}

inline int threads_for(int threads) {
    require(threads >= 1 && threads <= kMaxThreads, "threads out of range");
    return threads;
}


void bind_weights(nb::module_& m);  // weights in the kernel layout
void bind_search(nb::module_& m);   // what chooses scales and codes
void bind_engine(nb::module_& m);

}  // namespace nybble
