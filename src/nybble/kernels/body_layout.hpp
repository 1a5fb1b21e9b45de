// To the kernel layout and back (layout.hpp), one tile at a time. Included once per instruction set, after Lanes.

// Codes of sixteen rows, one a byte [16, columns_padded], to the lines of one tile.
template <int B>
inline void tile_lines(const std::uint8_t* codes, std::size_t padded, std::size_t units, std::uint8_t* to) {
    const auto word = [&](std::size_t r, std::size_t at) {
        std::uint32_t out;
        __builtin_memcpy(&out, codes + r * padded + at, 4);
        return out;
    };
    const auto put = [&](std::uint8_t* line, std::size_t r, std::uint32_t value) {
        __builtin_memcpy(line + 4 * r, &value, 4);
    };
    for (std::size_t u = 0; u < units; ++u, to += kLine * B) {
        const std::size_t at = u * kUnit;
        for (std::size_t r = 0; r < kRows; ++r) {
            std::uint8_t* line = to;
            int done = 0;
            if constexpr (B == 8) {
                for (std::size_t s = 0; s < 8; ++s) put(line + s * kLine, r, word(r, at + 4 * s));
            } else {
                if constexpr ((B & 4) != 0) {
                    for (std::size_t i = 0; i < 4; ++i, line += kLine)
                        put(line, r, (word(r, at + 8 * i) & 0x0f0f0f0fu) | (word(r, at + 8 * i + 4) & 0x0f0f0f0fu) << 4);
                    done = 4;
                }
                if constexpr ((B & 2) != 0) {
                    for (std::size_t i = 0; i < 2; ++i, line += kLine) {
                        std::uint32_t value = 0;
                        for (std::size_t s = 0; s < 4; ++s)
                            value |= ((word(r, at + 16 * i + 4 * s) >> done) & 0x03030303u) << (2 * s);
                        put(line, r, value);
                    }
                    done += 2;
                }
                if constexpr ((B & 1) != 0) {
                    std::uint32_t value = 0;
                    for (std::size_t s = 0; s < 8; ++s) value |= ((word(r, at + 4 * s) >> done) & 0x01010101u) << s;
                    put(line, r, value);
                }
            }
        }
    }
}

// One step of a unit: 64 bytes of codes, for row r at 4 r those of four columns.
template <int B, int S>
inline typename Lanes::I step(const std::uint8_t* unit) {
    using I = typename Lanes::I;
    if constexpr (B == 8) {
        return Lanes::line(unit + S * kLine);
    } else {
        I out = Lanes::whole(0);
        constexpr int pair = (B & 4) != 0 ? 4 : 0, single = pair + ((B & 2) != 0 ? 2 : 0);
        if constexpr ((B & 4) != 0) {
            const I line = Lanes::line(unit + (S / 2) * kLine);
            out = Lanes::both(S % 2 == 0 ? line : Lanes::template right<4>(line), Lanes::bytes(0x0f));
        }
        if constexpr ((B & 2) != 0) {
            const I line = Lanes::line(unit + (pair + S / 4) * kLine);
            constexpr int shift = 2 * (S % 4) - pair;
            I moved = line;
            if constexpr (shift > 0) moved = Lanes::template right<shift>(line);
            if constexpr (shift < 0) moved = Lanes::template left<-shift>(line);
            const I found = Lanes::both(moved, Lanes::bytes(std::uint8_t(3 << pair)));
            out = pair == 0 ? found : Lanes::either(out, found);
        }
        if constexpr ((B & 1) != 0) {
            const I line = Lanes::line(unit + single * kLine);
            constexpr int shift = S - single;
            I moved = line;
            if constexpr (shift > 0) moved = Lanes::template right<shift>(line);
            if constexpr (shift < 0) moved = Lanes::template left<-shift>(line);
            const I found = Lanes::both(moved, Lanes::bytes(std::uint8_t(1 << single)));
            out = single == 0 ? found : Lanes::either(out, found);
        }
        return out;
    }
}

// Calls f.template operator()<B>() for the run-time number of bits.
template <class F>
inline void with_plane_bits(int bits, F f) {
    switch (bits) {
        case 1: f.template operator()<1>(); break;
        case 2: f.template operator()<2>(); break;
        case 3: f.template operator()<3>(); break;
        case 4: f.template operator()<4>(); break;
        case 5: f.template operator()<5>(); break;
        case 6: f.template operator()<6>(); break;
        case 7: f.template operator()<7>(); break;
        default: f.template operator()<8>(); break;
    }
}

template <int B>
inline void unit_codes(const std::uint8_t* unit, std::uint8_t* to) {  // [8 steps][64]
    Lanes::store_line(to, step<B, 0>(unit));
    Lanes::store_line(to + 64, step<B, 1>(unit));
    Lanes::store_line(to + 128, step<B, 2>(unit));
    Lanes::store_line(to + 192, step<B, 3>(unit));
    Lanes::store_line(to + 256, step<B, 4>(unit));
    Lanes::store_line(to + 320, step<B, 5>(unit));
    Lanes::store_line(to + 384, step<B, 6>(unit));
    Lanes::store_line(to + 448, step<B, 7>(unit));
}

// Sixteen rows of a bit stream (nibbles, eight of a row in a word) straight to lines: the common case, vectorized.
inline void nibble_lines(const std::uint8_t* const* rows, std::size_t units, std::uint8_t* to) {
    for (std::size_t u = 0; u < units; ++u)
        for (std::size_t i = 0; i < 4; ++i, to += kLine)
            for (std::size_t r = 0; r < kRows; ++r) {
                std::uint32_t w;
                __builtin_memcpy(&w, rows[r] + 16 * u + 4 * i, 4);
                std::uint32_t low = w & 0xffffu, high = w >> 16;
                low = (low | low << 8) & 0x00ff00ffu;
                low = (low | low << 4) & 0x0f0f0f0fu;
                high = (high | high << 8) & 0x00ff00ffu;
                high = (high | high << 4) & 0x0f0f0f0fu;
                w = low | high << 4;
                __builtin_memcpy(to + 4 * r, &w, 4);
            }
}

// Packs one tile of codes: sixteen rows of a little-endian bit stream (nullptr: a row of zeros). scratch holds
// 16 * units * 32 bytes. Whole units of nibbles and bytes are moved without unpacking.
static void tile_codes(const std::uint8_t* const* rows, std::size_t columns, std::size_t units, int bits, std::uint8_t* to,
                       std::uint8_t* scratch) {
    const std::size_t padded = units * kUnit;
    bool full = bits == 4 && columns == padded;
    for (std::size_t r = 0; full && r < kRows; ++r) full = rows[r] != nullptr;
    if (full) return nibble_lines(rows, units, to);
    for (std::size_t r = 0; r < kRows; ++r) {
        std::uint8_t* row = scratch + r * padded;
        __builtin_memset(row, 0, padded);
        if (rows[r] == nullptr) continue;
        with_bits(bits, [&]<int B>() { unpack_row<B>(rows[r], row, columns); });
    }
    with_plane_bits(bits, [&]<int B>() { tile_lines<B>(scratch, padded, units, to); });
}

// The codes of sixteen rows of a tile again, one a byte [16, columns].
static void untile_codes(const Tiled& w, std::size_t tile, std::uint8_t* to) {
    const std::uint8_t* unit = w.data + tile * w.tile_bytes;
    alignas(64) std::uint8_t codes[kSteps * kLine];
    for (std::size_t u = 0; u < w.units; ++u, unit += kLine * std::size_t(w.bits)) {
        with_plane_bits(w.bits, [&]<int B>() { unit_codes<B>(unit, codes); });
        const std::size_t begin = u * kUnit;
        const std::size_t count = w.columns - begin < kUnit ? w.columns - begin : kUnit;
        for (std::size_t r = 0; r < kRows; ++r)
            for (std::size_t k = 0; k < count; ++k) to[r * w.columns + begin + k] = codes[(k / 4) * kLine + 4 * r + k % 4];
    }
}

inline typename Lanes::F load_parameter(const void* from, bool half, std::size_t at) {
    return half ? Lanes::load_half(static_cast<const std::uint16_t*>(from) + at)
                : Lanes::load(static_cast<const float*>(from) + at);
}

inline typename Lanes::F parameter(const Tiled& w, const void* from, bool half, const Nested& nested, std::size_t tile,
                                   std::size_t block) {
    const std::size_t at = (tile * w.blocks + block) * kRows;
    if (nested.codes == nullptr) return load_parameter(from, half, at);
    const typename Lanes::F outer = Lanes::load_half(nested.outer + (tile * nested.count + (block >> nested.shift)) * kRows);
    return Lanes::mul(outer, Lanes::to_float(Lanes::minus(Lanes::load_bytes(nested.codes + at), Lanes::whole(nested.bias))));
}

// Scale and offset of a block of one tile, a lane a row.
inline typename Lanes::F scale_of(const Tiled& w, std::size_t tile, std::size_t block) {
    return parameter(w, w.scale, w.scale_half, w.nested_scale, tile, block);
}
inline typename Lanes::F offset_of(const Tiled& w, std::size_t tile, std::size_t block) {
    return parameter(w, w.offset, w.offset_half, w.nested_offset, tile, block);
}

static void largest_scales(const Tiled& w, std::size_t tile, float* to) {
    typename Lanes::I top = Lanes::whole(0);  // floats without a sign are in the order of their bits, NaN behind infinity
    for (std::size_t b = 0; b < w.blocks; ++b)
        top = Lanes::most(top, Lanes::as_whole(Lanes::abs(scale_of(w, tile, b))));
    Lanes::store(to, Lanes::as_float(top));
}

// The float value of one row: an embedding look-up. to [columns].
static void tiled_row(const Tiled& w, std::size_t row, float* to) {
    const std::size_t tile = row / kRows, r = row % kRows;
    const std::uint8_t* data = w.data + tile * w.tile_bytes;
    alignas(64) float lanes[kRows], shifts[kRows];
    if (w.holds != Holds::codes) {
        const std::size_t size = w.holds == Holds::f32 ? 4 : 2;
        for (std::size_t k = 0; k < w.columns; ++k, data += kRows * size) {
            if (w.holds == Holds::f32) {
                __builtin_memcpy(to + k, data + 4 * r, 4);
                continue;
            }
            const auto* halves = reinterpret_cast<const std::uint16_t*>(data);
            Lanes::store(lanes, w.holds == Holds::f16 ? Lanes::load_half(halves) : Lanes::load_bfloat(halves));
            to[k] = lanes[r];
        }
        return;
    }
    alignas(64) std::uint8_t codes[kSteps * kLine];
    for (std::size_t k = 0; k < w.columns; ++k) {
        if (k % kUnit == 0)
            with_plane_bits(w.bits, [&]<int B>() { unit_codes<B>(data + (k / kUnit) * kLine * B, codes); });
        if (k % w.block == 0) {
            Lanes::store(lanes, scale_of(w, tile, k / w.block));
            if (w.offset != nullptr) Lanes::store(shifts, offset_of(w, tile, k / w.block));
        }
        const std::uint8_t code = codes[((k % kUnit) / 4) * kLine + 4 * r + k % 4];
        float level = w.table ? w.levels[code] : float(std::int32_t(code) - w.base);
        if (w.offset != nullptr && w.offset_is_zero) level -= shifts[r];
        to[k] = lanes[r] * level;
        if (w.offset != nullptr && !w.offset_is_zero) to[k] += shifts[r];
    }
}
