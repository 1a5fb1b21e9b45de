// Attention in whole numbers, over a cache of shorts (attention.hpp). Included once per instruction set, before
// body_attention.
//
// Queries, keys, values and softmax weights are whole numbers of 12 bits or so with a sign, so small that sums of their
// products stay within 32 bits: those are exact, and two are multiplied where a float is. What is rounded is
//
//     key, value    nearest(x / scale), scale = absmax / most of one position's key or value
//     query         the same for one query
//     weight        e^(score - top) * scale of the value, to nearest(that / step), step = the largest of 64 positions / most
//
// score = (sum * key scale) * query scale; out = fma(sum, step, out) for every 64 positions from a multiple of 64 on, then
// out / sum of e^(score - top). Neither depends on what other queries are met together.

inline constexpr std::size_t kSpan = 64;  // positions whose weights share a step

// The largest whole number that may be squared and summed so often within 32 bits.
inline float most_of(std::size_t terms) {
    const double most = __builtin_floor(__builtin_sqrt(2147483647.0 / double(terms)));
    return most < 32767.0 ? float(most) : 32767.0f;
}

// What whole numbers up to `most` count for where the largest magnitude has these bits. Not finite: NaN, so that it shows.
struct Rounding {
    float step, inverse;
    Rounding(std::int32_t bits, float most) : step(0.0f), inverse(0.0f) {
        float top;
        __builtin_memcpy(&top, &bits, 4);
        if (bits >= 0x7f800000) {
            step = __builtin_nanf("");
        } else if (top > 1e-30f) {
            step = top / most;
            inverse = most / top;
        }
    }
    inline I code(F v) const {  // 0 for what is not finite
        return step == step ? Lanes::to_whole(Lanes::mul(v, Lanes::all(inverse))) : Lanes::whole(0);
    }
};

inline Rounding rounding_of(const float* x, std::size_t depth, float most) {
    I top = Lanes::whole(0);  // bits of magnitudes order as the floats do, NaN above infinity
    for (std::size_t d = 0; d < depth; d += 16) top = Lanes::most(top, Lanes::as_whole(Lanes::abs(Lanes::load(x + d))));
    return {Lanes::largest(top), most};
}

static void append_shorts(const CacheHead& cache, std::size_t position, const float* key, const float* value) {
    const std::size_t depth = cache.shape->depth, tile = position / 16, lane = position % 16;
    auto* keys = reinterpret_cast<std::int16_t*>(cache.keys()) + (tile * depth / 2 * 16 + lane) * 2;
    auto* values = reinterpret_cast<std::int16_t*>(cache.values()) + position / 2 * depth * 2 + position % 2;
    const Rounding of_key = rounding_of(key, depth, most_of(depth)), of_value = rounding_of(value, depth, most_of(kSpan));
    reinterpret_cast<float*>(cache.key_scales())[position] = of_key.step;
    reinterpret_cast<float*>(cache.value_scales())[position] = of_value.step;
    alignas(64) std::int16_t codes[16];
    for (std::size_t d = 0; d < depth; d += 16) {
        Lanes::store_shorts(codes, of_key.code(Lanes::load(key + d)));
        for (std::size_t i = 0; i < 16; i += 2) __builtin_memcpy(keys + (d + i) * 16, codes + i, 4);
        Lanes::store_shorts(codes, of_value.code(Lanes::load(value + d)));
        for (std::size_t i = 0; i < 16; ++i) values[(d + i) * 2] = codes[i];
    }
}

// Sums of products of Q queries with the keys of T tiles, one or two. Two sets of sums are under way at a time, so that none
// waits for its last product: with one tile they are those of even and odd pairs of dimensions.
template <int Q, int T>
inline void short_scores(const std::int16_t* keys, const std::int16_t* queries, std::size_t depth, I* sums) {
    const auto* at = reinterpret_cast<const std::int8_t*>(queries);
    const std::size_t apart = T == 1 ? 32 : depth * 16, each = T == 1 ? 4 : 2;
    I one[Q], two[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) one[q] = two[q] = Lanes::whole(0);
    for (std::size_t d = 0; d < depth; d += each) {
        const I a = Lanes::line(keys + d * 16), b = Lanes::line(keys + d * 16 + apart);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
            const I x = Lanes::four(at + (std::size_t(q) * depth + d) * 2);
            one[q] = Lanes::dot_shorts(one[q], a, x);
            two[q] = Lanes::dot_shorts(two[q], b, T == 1 ? Lanes::four(at + (std::size_t(q) * depth + d) * 2 + 4) : x);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
        sums[q] = T == 1 ? Lanes::plus(one[q], two[q]) : one[q];
        if constexpr (T == 2) sums[Q + q] = two[q];
    }
}

// sums [Q, depth] += weights of `count` positions of a span times their values; 32 dimensions at a time, then the last 16.
template <int Q>
inline void short_mix(const std::int16_t* values, std::size_t count, std::size_t depth, const std::int16_t* weights,
                      std::size_t stride, const Rounding* steps, std::size_t spans, float* sums) {
    const auto* at = reinterpret_cast<const std::int8_t*>(weights);
    const auto mix = [&]<int T>(std::size_t d) __attribute__((always_inline)) {
        I sum[T * Q];
#pragma GCC unroll 16
        for (int i = 0; i < T * Q; ++i) sum[i] = Lanes::whole(0);
        for (std::size_t p = 0; p < count; p += 2) {
            const std::int16_t* from = values + p * depth + d * 2;
            const I v[2] = {Lanes::line(from), Lanes::line(from + (T - 1) * 32)};
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q) {
                const I x = Lanes::four(at + (std::size_t(q) * stride + p) * 2);
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t) sum[t * Q + q] = Lanes::dot_shorts(sum[t * Q + q], v[t], x);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < T * Q; ++i) {
            float* to = sums + std::size_t(i % Q) * depth + d + std::size_t(i / Q) * 16;
            Lanes::store(to, Lanes::fma(Lanes::to_float(sum[i]), Lanes::all(steps[std::size_t(i % Q) * spans].step), Lanes::load(to)));
        }
    };
    std::size_t d = 0;
    for (; d + 32 <= depth; d += 32) mix.template operator()<2>(d);
    if (d < depth) mix.template operator()<1>(d);
}

// Positions [p, p + 16) of v; zero outside of [from, to).
inline F seen(F v, std::size_t p, std::size_t from, std::size_t to) {
    if (p >= from && p + 16 <= to) return v;
    alignas(64) float at[16];
    Lanes::store(at, v);
    for (std::size_t i = 0; i < 16; ++i)
        if (p + i < from || p + i >= to) at[i] = 0.0f;
    return Lanes::load(at);
}

// Scores, in powers of two, of positions [from, to) to codes of their softmax times the scale of the values, zeros up to
// `stride`. Positions count from `scores`, `scales` and `codes` alike. Returns the sum of 2^(score - top).
inline float short_weights(float* scores, std::size_t from, std::size_t to, std::size_t stride, const float* scales,
                           std::int16_t* codes, Rounding* steps) {
    const std::size_t begin = from / 16 * 16, end = (to + 15) / 16 * 16;
    for (std::size_t p = begin; p < from; ++p) scores[p] = -__builtin_inff();
    for (std::size_t p = to; p < end; ++p) scores[p] = -__builtin_inff();
    F top = Lanes::all(-__builtin_inff());
    for (std::size_t p = begin; p < end; p += 16) top = Lanes::max(top, Lanes::load(scores + p));
    const F most = Lanes::all(Lanes::largest(top));
    F total = Lanes::all(0.0f);
    for (std::size_t span = 0; span < stride; span += kSpan) {
        I high = Lanes::whole(0);
        for (std::size_t p = span > begin ? span : begin; p < end && p < span + kSpan; p += 16) {
            const F power = seen(power_of_two(Lanes::sub(Lanes::load(scores + p), most)), p, from, to);
            const F weight = seen(Lanes::mul(power, Lanes::load(scales + p)), p, from, to);
            total = Lanes::add(total, power);
            high = Lanes::most(high, Lanes::as_whole(Lanes::abs(weight)));
            Lanes::store(scores + p, weight);
        }
        steps[span / kSpan] = Rounding(Lanes::largest(high), most_of(kSpan));
    }
    // In a second pass: nothing waits for the largest of a span and the division by it.
    for (std::size_t p = 0; p < begin; p += 16) Lanes::store_shorts(codes + p, Lanes::whole(0));
    for (std::size_t p = begin; p < end; p += 16) Lanes::store_shorts(codes + p, steps[p / kSpan].code(Lanes::load(scores + p)));
    for (std::size_t p = end; p < stride; p += 16) Lanes::store_shorts(codes + p, Lanes::whole(0));
    return Lanes::sum(total);
}

static std::size_t shorts_scratch(std::size_t depth, std::size_t positions) {
    const std::size_t stride = positions + 2 * kSpan;
    return kQueries * ((depth + stride) * sizeof(float) + stride / kSpan * sizeof(Rounding) + (depth + stride) * sizeof(std::int16_t)) +
           depth * sizeof(float);
}

template <int Q>
inline void attend_some_shorts(const Attend& a, void* scratch) {
    const std::size_t depth = a.cache.shape->depth;
    std::size_t first = a.first[0], last = a.last[0];
    for (std::size_t q = 1; q < a.count; ++q) {
        if (a.first[q] < first) first = a.first[q];
        if (a.last[q] > last) last = a.last[q];
    }
    const std::size_t start = first / kSpan * kSpan, end = (last + 15) / 16 * 16;
    const std::size_t spans = (end - start + kSpan - 1) / kSpan, stride = spans * kSpan;
    float* sums = static_cast<float*>(scratch);  // [Q, depth]
    float* scores = sums + kQueries * depth;     // [Q, stride]
    float* row = scores + kQueries * stride;     // [depth]
    auto* steps = reinterpret_cast<Rounding*>(row + depth);  // [Q, spans]
    auto* queries = reinterpret_cast<std::int16_t*>(steps + kQueries * spans);  // [Q, depth]
    std::int16_t* weights = queries + kQueries * depth;            // [Q, stride]
    float scale[Q], inverse[Q];
    __builtin_memset(sums, 0, Q * depth * sizeof(float));
    __builtin_memset(row, 0, depth * sizeof(float));
    for (std::size_t q = 0; q < Q; ++q) {
        __builtin_memcpy(row, a.queries[q < a.count ? q : a.count - 1], a.dimensions * sizeof(float));
        const Rounding how = rounding_of(row, depth, most_of(depth));
        for (std::size_t d = 0; d < depth; d += 16) Lanes::store_shorts(queries + q * depth + d, how.code(Lanes::load(row + d)));
        scale[q] = how.step * a.scale * (a.cap == 0.0f ? kLog2E : 1.0f);
    }
    const auto* keys = reinterpret_cast<const std::int16_t*>(a.cache.keys());
    const auto* key_scales = reinterpret_cast<const float*>(a.cache.key_scales());
    const auto score = [&]<int T>(std::size_t p) __attribute__((always_inline)) {
        I sum[T * Q];
        short_scores<Q, T>(keys + p * depth, queries, depth, sum);
        for (int t = 0; t < T; ++t) {
            const F by = Lanes::load(key_scales + p + t * 16);
            for (int q = 0; q < Q; ++q) {
                F y = Lanes::mul(Lanes::mul(Lanes::to_float(sum[t * Q + q]), by), Lanes::all(scale[q]));
                if (a.cap != 0.0f) y = Lanes::mul(tangent(Lanes::div(y, Lanes::all(a.cap))), Lanes::all(a.cap * kLog2E));
                Lanes::store(scores + std::size_t(q) * stride + p + std::size_t(t) * 16 - start, y);
            }
        }
    };
    std::size_t at = start;
    for (; at + 32 <= end; at += 32) score.template operator()<2>(at);
    if (at < end) score.template operator()<1>(at);
    const float* value_scales = reinterpret_cast<const float*>(a.cache.value_scales()) + start;
    for (std::size_t q = 0; q < Q; ++q) {
        const std::size_t at = q < a.count ? q : a.count - 1;
        inverse[q] = 1.0f / short_weights(scores + q * stride, a.first[at] - start, a.last[at] - start, stride, value_scales,
                                          weights + q * stride, steps + q * spans);
    }
    const auto* values = reinterpret_cast<const std::int16_t*>(a.cache.values());
    for (std::size_t p = start; p < last; p += kSpan)
        short_mix<Q>(values + p * depth, last - p < kSpan ? last - p : kSpan, depth, weights + p - start, stride,
                     steps + (p - start) / kSpan, spans, sums);
    for (std::size_t q = 0; q < a.count; ++q)
        for (std::size_t d = 0; d < a.dimensions; ++d) a.out[q][d] = sums[q * depth + d] * inverse[q];
}

static void attend_shorts(const Attend& a, void* scratch) {
    if (a.count == 1) return attend_some_shorts<1>(a, scratch);
    if (a.count == 2) return attend_some_shorts<2>(a, scratch);
    if (a.count <= 4) return attend_some_shorts<4>(a, scratch);
    attend_some_shorts<8>(a, scratch);
}
