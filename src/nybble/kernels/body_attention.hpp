// Attention over a cache (attention.hpp). Included once per instruction set, after body_math.
//
// Scores, softmax and mixing are float32 whatever the cache holds; each tile of sixteen positions is turned into floats
// once for all queries that meet it. Sums run over positions in order, so results do not depend on how queries are grouped.

// ---- the cache: to it and from it --------------------------------------------------------------------------------------

inline std::uint16_t half_up(float v) {  // v >= 0, rounded up to half
    alignas(64) std::uint16_t half[16];
    alignas(64) float back[16];
    Lanes::store_half(half, Lanes::all(v));
    Lanes::store(back, Lanes::load_half(half));
    return std::uint16_t(back[0] < v ? half[0] + 1 : half[0]);
}

// Codes of a group of 16 or 32 values with `most` = 127 or 7; returns the half scale.
inline std::uint16_t group_codes(const float* x, std::size_t group, float most, std::int32_t* codes) {
    const F a = Lanes::load(x), b = group == 32 ? Lanes::load(x + 16) : Lanes::all(0.0f);
    const std::uint16_t scale = half_up(Lanes::largest(Lanes::max(Lanes::abs(a), Lanes::abs(b))) / most);
    alignas(64) std::uint16_t halves[16] = {scale};
    alignas(64) float wide[16];
    Lanes::store(wide, Lanes::load_half(halves));
    const F by = Lanes::all(wide[0] > 0.0f ? wide[0] : 1.0f), top = Lanes::all(most), bottom = Lanes::all(-most);
    Lanes::store_line(codes, Lanes::to_whole(Lanes::max(Lanes::min(Lanes::div(a, by), top), bottom)));
    if (group == 32) Lanes::store_line(codes + 16, Lanes::to_whole(Lanes::max(Lanes::min(Lanes::div(b, by), top), bottom)));
    return scale;
}

// Writes key and value [depth] (filled up with zeros) of one position.
static void append(const CacheHead& cache, std::size_t position, const float* key, const float* value) {
    const CacheShape& s = *cache.shape;
    const std::size_t tile = position / 16, lane = position % 16, depth = s.depth;
    if (s.type == CacheType::f32) {
        float* keys = reinterpret_cast<float*>(cache.keys()) + tile * depth * 16 + lane;
        for (std::size_t d = 0; d < depth; ++d) keys[d * 16] = key[d];
        __builtin_memcpy(cache.values() + position * depth * 4, value, depth * 4);
        return;
    }
    if (s.type == CacheType::f16) {
        std::uint16_t* keys = reinterpret_cast<std::uint16_t*>(cache.keys()) + tile * depth * 16 + lane;
        auto* values = reinterpret_cast<std::uint16_t*>(cache.values()) + position * depth;
        alignas(64) std::uint16_t halves[16];
        for (std::size_t d = 0; d < depth; d += 16) {
            Lanes::store_half(halves, Lanes::load(key + d));
            for (std::size_t i = 0; i < 16; ++i) keys[(d + i) * 16] = halves[i];
            Lanes::store_half(values + d, Lanes::load(value + d));
        }
        return;
    }
    if (s.type == CacheType::int16) return append_shorts(cache, position, key, value);
    const std::size_t group = s.group(), groups = depth / group;
    const bool small = s.type == CacheType::int4;
    auto* key_scales = reinterpret_cast<std::uint16_t*>(cache.key_scales()) + tile * groups * 16 + lane;
    auto* value_scales = reinterpret_cast<std::uint16_t*>(cache.value_scales()) + position * groups;
    alignas(64) std::int32_t codes[32];
    for (std::size_t g = 0; g < groups; ++g) {
        key_scales[g * 16] = group_codes(key + g * group, group, small ? 7.0f : 127.0f, codes);
        if (small) {
            std::uint8_t* to = cache.keys() + (tile * depth / 2 + g * 16) * 16 + lane;
            for (std::size_t i = 0; i < 16; ++i) to[i * 16] = std::uint8_t((codes[2 * i] + 8) | (codes[2 * i + 1] + 8) << 4);
        } else {
            std::uint8_t* to = cache.keys() + (tile * depth + g * group) * 16 + lane;
            for (std::size_t i = 0; i < group; ++i) to[i * 16] = std::uint8_t(codes[i] + 128);
        }
        value_scales[g] = group_codes(value + g * group, group, small ? 7.0f : 127.0f, codes);
        if (small) {
            std::uint8_t* to = cache.values() + position * depth / 2 + g * 16;
            for (std::size_t i = 0; i < 16; ++i) to[i] = std::uint8_t((codes[i] + 8) | (codes[i + 16] + 8) << 4);
        } else {
            std::uint8_t* to = cache.values() + position * depth + g * group;
            for (std::size_t i = 0; i < group; ++i) to[i] = std::uint8_t(codes[i] + 128);
        }
    }
}

// Keys of one tile as floats [depth][16]; scratch unless they are that already.
static const float* key_tile(const CacheHead& cache, std::size_t tile, float* scratch) {
    const CacheShape& s = *cache.shape;
    if (s.type == CacheType::f32) return reinterpret_cast<const float*>(cache.keys()) + tile * s.depth * 16;
    if (s.type == CacheType::f16) {
        const auto* from = reinterpret_cast<const std::uint16_t*>(cache.keys()) + tile * s.depth * 16;
        for (std::size_t d = 0; d < s.depth; ++d) Lanes::store(scratch + d * 16, Lanes::load_half(from + d * 16));
        return scratch;
    }
    const std::size_t group = s.group(), groups = s.depth / group;
    const auto* scales = reinterpret_cast<const std::uint16_t*>(cache.key_scales()) + tile * groups * 16;
    for (std::size_t g = 0; g < groups; ++g) {
        const F scale = Lanes::load_half(scales + g * 16);
        for (std::size_t i = 0; i < group; ++i) {
            const std::size_t d = g * group + i;
            I code;
            if (s.type == CacheType::int8) {
                code = Lanes::minus(Lanes::load_bytes(cache.keys() + (tile * s.depth + d) * 16), Lanes::whole(128));
            } else {
                const I pair = Lanes::load_bytes(cache.keys() + (tile * s.depth / 2 + d / 2) * 16);
                code = Lanes::minus(d % 2 == 0 ? Lanes::both(pair, Lanes::whole(15)) : Lanes::template right<4>(pair), Lanes::whole(8));
            }
            Lanes::store(scratch + d * 16, Lanes::mul(Lanes::to_float(code), scale));
        }
    }
    return scratch;
}

// Values of `count` positions from `position` on as floats [count][depth].
static const float* value_rows(const CacheHead& cache, std::size_t position, std::size_t count, float* scratch) {
    const CacheShape& s = *cache.shape;
    if (s.type == CacheType::f32) return reinterpret_cast<const float*>(cache.values()) + position * s.depth;
    if (s.type == CacheType::f16) {
        const auto* from = reinterpret_cast<const std::uint16_t*>(cache.values()) + position * s.depth;
        for (std::size_t i = 0; i < count * s.depth; i += 16) Lanes::store(scratch + i, Lanes::load_half(from + i));
        return scratch;
    }
    const std::size_t group = s.group(), groups = s.depth / group;
    alignas(64) std::uint16_t halves[16] = {};
    alignas(64) float wide[16];
    for (std::size_t p = 0; p < count; ++p) {
        const auto* scales = reinterpret_cast<const std::uint16_t*>(cache.value_scales()) + (position + p) * groups;
        float* to = scratch + p * s.depth;
        for (std::size_t g = 0; g < groups; ++g, to += group) {
            halves[0] = scales[g];
            Lanes::store(wide, Lanes::load_half(halves));
            const F scale = Lanes::all(wide[0]);
            if (s.type == CacheType::int8) {
                const std::uint8_t* from = cache.values() + (position + p) * s.depth + g * group;
                for (std::size_t i = 0; i < group; i += 16)
                    Lanes::store(to + i, Lanes::mul(Lanes::to_float(Lanes::minus(Lanes::load_bytes(from + i), Lanes::whole(128))), scale));
            } else {
                const I pair = Lanes::load_bytes(cache.values() + (position + p) * s.depth / 2 + g * 16);
                const I low = Lanes::both(pair, Lanes::whole(15)), high = Lanes::template right<4>(pair);
                Lanes::store(to, Lanes::mul(Lanes::to_float(Lanes::minus(low, Lanes::whole(8))), scale));
                Lanes::store(to + 16, Lanes::mul(Lanes::to_float(Lanes::minus(high, Lanes::whole(8))), scale));
            }
        }
    }
    return scratch;
}

static void widen_head(const CacheHead& from, std::size_t first, std::size_t positions, const CacheHead& to) {
    const std::size_t depth = from.shape->depth;
    auto* keys = reinterpret_cast<float*>(to.keys());
    auto* values = reinterpret_cast<float*>(to.values());
    for (std::size_t p = first; p < positions; p += 16) {
        key_tile(from, p / 16, keys + p * depth);
        value_rows(from, p, positions - p < 16 ? positions - p : 16, values + p * depth);
    }
}

// ---- attention --------------------------------------------------------------------------------------------------------

template <int Q>
inline void scores_of(const float* keys, const float* const* queries, std::size_t depth, F* out) {
    F even[Q], odd[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) even[q] = odd[q] = Lanes::all(0.0f);
    for (std::size_t d = 0; d < depth; d += 2) {  // depth is even
        const F a = Lanes::load(keys + d * 16), b = Lanes::load(keys + d * 16 + 16);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            even[q] = Lanes::fma(a, Lanes::all(queries[q][d]), even[q]);
            odd[q] = Lanes::fma(b, Lanes::all(queries[q][d + 1]), odd[q]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) out[q] = Lanes::add(even[q], odd[q]);
}

template <int Q>
inline void mix(const float* values, std::size_t count, std::size_t depth, const float* weights, std::size_t stride, float* sums) {
    for (std::size_t d = 0; d < depth; d += 16) {
        F sum[Q];
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) sum[q] = Lanes::load(sums + q * depth + d);
        for (std::size_t p = 0; p < count; ++p) {
            const F v = Lanes::load(values + p * depth + d);
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) sum[q] = Lanes::fma(v, Lanes::all(weights[q * stride + p]), sum[q]);
        }
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) Lanes::store(sums + q * depth + d, sum[q]);
    }
}

// Bytes of scratch that attend needs for a cache of this depth and so many positions, of whatever type.
static std::size_t attend_scratch(std::size_t depth, std::size_t positions) {
    const std::size_t floats = (2 * kQueries * depth + 16 * depth + kQueries * (positions + 32)) * sizeof(float);
    const std::size_t shorts = shorts_scratch(depth, positions);
    return floats > shorts ? floats : shorts;
}

template <int Q>
inline void attend_some(const Attend& a, void* scratch) {
    const std::size_t depth = a.cache.shape->depth;
    float* queries = static_cast<float*>(scratch);        // [Q, depth], scaled
    float* sums = queries + kQueries * depth;             // [Q, depth]
    float* tile_floats = sums + kQueries * depth;         // [16 * depth]
    float* weights = tile_floats + 16 * depth;            // [Q, stride]
    const float* rows[Q];
    std::size_t first = a.first[0], last = a.last[0];
    for (int q = 0; q < Q; ++q) {
        const std::size_t at = std::size_t(q) < a.count ? std::size_t(q) : a.count - 1;
        if (a.first[at] < first) first = a.first[at];
        if (a.last[at] > last) last = a.last[at];
        float* row = queries + q * depth;
        __builtin_memset(row, 0, depth * sizeof(float));
        for (std::size_t d = 0; d < a.dimensions; ++d) row[d] = a.queries[at][d] * a.scale;
        __builtin_memset(sums + q * depth, 0, depth * sizeof(float));
        rows[q] = row;
    }
    const std::size_t start = first / 16, end = (last + 15) / 16, stride = (end - start) * 16;
    for (std::size_t tile = start; tile < end; ++tile) {
        F score[Q];
        scores_of<Q>(key_tile(a.cache, tile, tile_floats), rows, depth, score);
        for (int q = 0; q < Q; ++q) {
            if (a.cap != 0.0f) score[q] = Lanes::mul(tangent(Lanes::div(score[q], Lanes::all(a.cap))), Lanes::all(a.cap));
            Lanes::store(weights + q * stride + (tile - start) * 16, score[q]);
        }
    }
    float inverse[Q];
    for (int q = 0; q < Q; ++q) {
        const std::size_t at = std::size_t(q) < a.count ? std::size_t(q) : a.count - 1;
        float* row = weights + q * stride;
        const std::size_t from = a.first[at] - start * 16, to = a.last[at] - start * 16;
        // What is not seen has weight 0. Tiles outside of it count for nothing; those at its ends are seen in part.
        const std::size_t begin = from / 16 * 16, end = (to + 15) / 16 * 16;
        for (std::size_t p = 0; p < begin; ++p) row[p] = 0.0f;
        for (std::size_t p = begin; p < from; ++p) row[p] = -__builtin_inff();
        for (std::size_t p = to; p < end; ++p) row[p] = -__builtin_inff();
        for (std::size_t p = end; p < stride; ++p) row[p] = 0.0f;
        F top = Lanes::all(-__builtin_inff());
        for (std::size_t p = begin; p < end; p += 16) top = Lanes::max(top, Lanes::load(row + p));
        const F most = Lanes::all(Lanes::largest(top));
        F total = Lanes::all(0.0f);
        for (std::size_t p = begin; p < end; p += 16) {
            F weight = exponential(Lanes::sub(Lanes::load(row + p), most));
            if (p < from || p + 16 > to) {
                Lanes::store(row + p, weight);
                for (std::size_t i = p; i < from; ++i) row[i] = 0.0f;
                for (std::size_t i = to; i < p + 16; ++i) row[i] = 0.0f;
                weight = Lanes::load(row + p);
            }
            Lanes::store(row + p, weight);
            total = Lanes::add(total, weight);
        }
        inverse[q] = 1.0f / Lanes::sum(total);
    }
    // Floats need no turning and are met in one go.
    const std::size_t step = a.cache.shape->type == CacheType::f32 ? stride : 16;
    for (std::size_t p = start * 16; p < last; p += step) {
        const std::size_t count = last - p < step ? last - p : step;
        const float* values = value_rows(a.cache, p, count, tile_floats);
        mix<Q>(values, count, depth, weights + p - start * 16, stride, sums);
    }
    for (std::size_t q = 0; q < a.count; ++q)
        for (std::size_t d = 0; d < a.dimensions; ++d) a.out[q][d] = sums[q * depth + d] * inverse[q];
}

static void attend(const Attend& a, void* scratch) {
    if (a.cache.shape->type == CacheType::int16) return attend_shorts(a, scratch);
    if (a.count == 1) return attend_some<1>(a, scratch);
    if (a.count == 2) return attend_some<2>(a, scratch);
    if (a.count <= 4) return attend_some<4>(a, scratch);
    attend_some<8>(a, scratch);
}
