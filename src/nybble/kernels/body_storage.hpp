// What is done with codes in storage, written once over a small vector type `Simd` (simd_*.hpp).
//
// Included inside `namespace nybble::<instruction set>` after Simd is defined; must stay free of C++ library headers
// (kernels.hpp says why). Simd gives: W lanes, Float and Int vectors, codes<B>(bytes) -> Int (the W codes of B bits
// that start at a byte; bits above B may be set), Map<B, Affine> (codes -> levels) and arithmetic.
//
// Here: codes as files store them (packing, unpacking, decoding a row). Products work on the kernel layout (layout.hpp).
// Numbers: decode is scale * (level - offset) or scale * level + offset, each step rounded to float32, equal to the reference
// to the bit.

template <int B>
inline void pack_rows(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows, std::size_t columns) {
    const std::size_t row_bytes = (columns * B + 7) / 8;
    for (std::size_t n = 0; n < rows; ++n) {
        const std::uint8_t* from = codes + n * columns;
        std::uint8_t* to = packed + n * row_bytes;
        std::size_t k = 0;
        for (; k + 8 <= columns; k += 8, to += B) {  // 8 codes are B whole bytes
            std::uint64_t word = 0;
            for (int i = 0; i < 8; ++i) word |= std::uint64_t(from[k + i]) << (i * B);
            for (int i = 0; i < B; ++i) to[i] = std::uint8_t(word >> (8 * i));
        }
        if (k < columns) {
            std::uint64_t word = 0;
            for (std::size_t i = 0; k + i < columns; ++i) word |= std::uint64_t(from[k + i]) << (i * B);
            for (std::size_t i = 0; i < ((columns - k) * B + 7) / 8; ++i) to[i] = std::uint8_t(word >> (8 * i));
        }
    }
}

template <int B>
inline void unpack_row(const std::uint8_t* from, std::uint8_t* to, std::size_t columns) {
    constexpr std::uint64_t mask = (1u << B) - 1;
    std::size_t k = 0;
    for (; k + 8 <= columns; k += 8, from += B) {
        std::uint64_t word = 0;
        for (int i = 0; i < B; ++i) word |= std::uint64_t(from[i]) << (8 * i);
        for (int i = 0; i < 8; ++i) to[k + i] = std::uint8_t((word >> (i * B)) & mask);
    }
    if (k < columns) {
        std::uint64_t word = 0;
        for (std::size_t i = 0; i < ((columns - k) * B + 7) / 8; ++i) word |= std::uint64_t(from[i]) << (8 * i);
        for (std::size_t i = 0; k + i < columns; ++i) to[k + i] = std::uint8_t((word >> (i * B)) & mask);
    }
}

// Calls f.template operator()<B>() for the run-time value of bits.
template <class F>
inline void with_bits(int bits, F f) {
    switch (bits) {
        case 1:
            f.template operator()<1>();
            break;
        case 2:
            f.template operator()<2>();
            break;
        case 3:
            f.template operator()<3>();
            break;
        case 4:
            f.template operator()<4>();
            break;
        case 5:
            f.template operator()<5>();
            break;
        case 6:
            f.template operator()<6>();
            break;
        case 7:
            f.template operator()<7>();
            break;
        default:
            f.template operator()<8>();
            break;
    }
}

static void pack(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows, std::size_t columns, int bits) {
    with_bits(bits, [&]<int B>() { pack_rows<B>(codes, packed, rows, columns); });
}

static void unpack(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows, std::size_t columns, int bits) {
    with_bits(bits, [&]<int B>() {
        const std::size_t row_bytes = (columns * B + 7) / 8;
        for (std::size_t n = 0; n < rows; ++n) unpack_row<B>(packed + n * row_bytes, codes + n * columns, columns);
    });
}

// One row made ready: float scales and offsets, and codes that start on a byte in every block.
struct Row {
    const std::uint8_t* codes;
    const float* scale;
    const float* offset;  // nullptr: no offsets
    std::size_t block_bytes;
};

// The floats of one row of scales; halves are converted to scratch.
static const float* as_floats(const void* all, bool half, std::size_t start, std::size_t count, float* scratch) {
    if (!half) return static_cast<const float*>(all) + start;
    Simd::halves(static_cast<const std::uint16_t*>(all) + start, count, scratch);
    return scratch;
}

// True when blocks start inside a byte (an odd group of 3-bit codes, say): such rows go through one code a byte.
static bool straddles(const Weight& w) { return w.blocks > 1 && (w.block * std::size_t(w.bits)) % 8 != 0; }

template <int B>
inline Row prepare(const Weight& w, std::size_t n, bool bytes, void* scratch) {
    const std::size_t parameters = ((w.blocks + 2 * kPad) * sizeof(float) + 63) / 64 * 64;
    auto* area = static_cast<std::uint8_t*>(scratch);
    Row row;
    row.scale = as_floats(w.scale, w.scale_half, n * w.scale_stride, w.blocks, reinterpret_cast<float*>(area));
    row.offset = w.offset == nullptr ? nullptr
                                     : as_floats(w.offset, w.offset_half, n * w.offset_stride, w.blocks,
                                                 reinterpret_cast<float*>(area + parameters));
    const std::uint8_t* packed = w.packed + n * w.row_bytes;
    if (bytes) {
        std::uint8_t* codes = area + 2 * parameters;
        with_bits(w.bits, [&]<int C>() { unpack_row<C>(packed, codes, w.columns); });
        row.codes = codes;
    } else if (std::size_t(w.packed_end - packed) < w.row_bytes + kOverread) {
        std::uint8_t* copy = area + 2 * parameters;
        __builtin_memcpy(copy, packed, w.row_bytes);
        row.codes = copy;
    } else {
        row.codes = packed;
    }
    row.block_bytes = w.block * B / 8;
    return row;
}

template <int B, bool Affine>
static void decode_one(const Weight& w, std::size_t n, bool bytes, float* out, void* scratch) {
    const typename Simd::template Map<B, Affine> map(w);
    const Row row = prepare<B>(w, n, bytes, scratch);
    for (std::size_t g = 0; g < w.blocks; ++g) {
        const std::uint8_t* codes = row.codes + g * row.block_bytes;
        const std::size_t begin = g * w.block;
        const std::size_t length = w.columns - begin < w.block ? w.columns - begin : w.block;
        const auto scale = Simd::all(row.scale[g]);
        const auto offset = Simd::all(row.offset == nullptr ? 0.0f : row.offset[g]);
        const auto value = [&](const std::uint8_t* from) {
            const auto level = map(Simd::template codes<B>(from));
            return w.shifted ? Simd::add(Simd::mul(scale, level), offset) : Simd::mul(scale, Simd::sub(level, offset));
        };
        std::size_t k = 0;
        for (; k + Simd::W <= length; k += Simd::W, codes += Simd::W * B / 8) Simd::store(out + begin + k, value(codes));
        if (k < length) {
            alignas(64) float last[Simd::W];
            Simd::store(last, value(codes));
            __builtin_memcpy(out + begin + k, last, (length - k) * sizeof(float));
        }
    }
}

static void decode_row(const Weight& w, std::size_t n, float* out, void* scratch) {
    const bool bytes = straddles(w);
    with_bits(bytes ? 8 : w.bits, [&]<int B>() {
        if (w.affine)
            decode_one<B, true>(w, n, bytes, out, scratch);
        else
            decode_one<B, false>(w, n, bytes, out, scratch);
    });
}

static std::uint64_t sum(const std::uint64_t* words, std::size_t count) {
    std::uint64_t parts[32] = {};
    std::size_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 32; ++j) parts[j] += words[i + j];
    for (; i < count; ++i) parts[0] += words[i];
    std::uint64_t total = 0;
    for (int j = 0; j < 32; ++j) total += parts[j];
    return total;
}
