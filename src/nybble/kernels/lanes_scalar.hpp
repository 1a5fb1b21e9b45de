// Sixteen lanes in plain C++: the definition of every operation, and the path for machines without wide registers.
// Included inside a namespace of its own (isa_scalar.cpp).
//
// A lane is a row of the weight (layout.hpp). F holds sixteen floats, I sixteen 32-bit integers, or the same 64 bytes
// seen as unsigned bytes. Every operation rounds once, as IEEE 754 says, so that all instruction sets give the same bits.

struct Lanes {
    static constexpr int kPatchTiles = 1, kPatchRows = 1;  // of a panel's sums that are under way together
    static constexpr int kTokens = 1;
    struct F {
        float at[16];
    };
    struct I {
        std::int32_t at[16];
    };

    template <class R, class Each>
    static inline R make(Each each) {
        R out;
        for (int i = 0; i < 16; ++i) out.at[i] = each(i);
        return out;
    }

    static inline F all(float v) {
        return make<F>([&](int) { return v; });
    }
    static inline F load(const float* from) {
        return make<F>([&](int i) { return from[i]; });
    }
    static inline void store(float* to, F v) {
        for (int i = 0; i < 16; ++i) to[i] = v.at[i];
    }
    static inline F load_half(const std::uint16_t* from) {
        return make<F>([&](int i) { return half_to_float(from[i]); });
    }
    static inline void store_half(std::uint16_t* to, F v) {
        for (int i = 0; i < 16; ++i) to[i] = float_to_half(v.at[i]);
    }
    static inline F load_bfloat(const std::uint16_t* from) {
        return make<F>([&](int i) { return float_of(std::uint32_t(from[i]) << 16); });
    }
    static inline F add(F a, F b) {
        return make<F>([&](int i) { return a.at[i] + b.at[i]; });
    }
    static inline F sub(F a, F b) {
        return make<F>([&](int i) { return a.at[i] - b.at[i]; });
    }
    static inline F mul(F a, F b) {
        return make<F>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static inline F div(F a, F b) {
        return make<F>([&](int i) { return a.at[i] / b.at[i]; });
    }
    static inline F fma(F a, F b, F c) {  // one rounding
        return make<F>([&](int i) { return __builtin_fmaf(a.at[i], b.at[i], c.at[i]); });
    }
    static inline F max(F a, F b) {  // b where either is not a number
        return make<F>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
    }
    static inline F min(F a, F b) {
        return make<F>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
    }
    static inline F abs(F a) {
        return make<F>([&](int i) { return __builtin_fabsf(a.at[i]); });
    }
    static inline F sqrt(F a) {
        return make<F>([&](int i) { return __builtin_sqrtf(a.at[i]); });
    }
    // Sum and largest of all lanes, by halves: lanes 0 and 8, 1 and 9, .., then of those 0 and 4, and so on.
    static inline float sum(F a) {
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) a.at[i] += a.at[i + width];
        return a.at[0];
    }
    static inline float largest(F a) {
        for (int width = 8; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) a.at[i] = a.at[i] > a.at[i + width] ? a.at[i] : a.at[i + width];
        return a.at[0];
    }

    static inline I whole(std::int32_t v) {
        return make<I>([&](int) { return v; });
    }
    static inline I bytes(std::uint8_t v) { return whole(std::int32_t(v * 0x01010101u)); }
    static inline I line(const void* from) {  // 64 bytes
        I out;
        __builtin_memcpy(out.at, from, 64);
        return out;
    }
    static inline void store_line(void* to, I v) { __builtin_memcpy(to, v.at, 64); }
    static inline I four(const std::int8_t* from) {  // the same four bytes in every lane
        std::int32_t word;
        __builtin_memcpy(&word, from, 4);
        return whole(word);
    }
    static inline I both(I a, I b) {
        return make<I>([&](int i) { return a.at[i] & b.at[i]; });
    }
    static inline I either(I a, I b) {
        return make<I>([&](int i) { return a.at[i] | b.at[i]; });
    }
    static inline I flip(I a, I b) {
        return make<I>([&](int i) { return a.at[i] ^ b.at[i]; });
    }
    template <int N>
    static inline I right(I a) {  // bits pass from byte to byte: mask them
        return make<I>([&](int i) { return std::int32_t(std::uint32_t(a.at[i]) >> N); });
    }
    template <int N>
    static inline I left(I a) {
        return make<I>([&](int i) { return std::int32_t(std::uint32_t(a.at[i]) << N); });
    }
    static inline I plus(I a, I b) {
        return make<I>([&](int i) { return std::int32_t(std::uint32_t(a.at[i]) + std::uint32_t(b.at[i])); });
    }
    static inline I minus(I a, I b) {
        return make<I>([&](int i) { return std::int32_t(std::uint32_t(a.at[i]) - std::uint32_t(b.at[i])); });
    }
    static inline I as_whole(F a) {  // the bits
        I out;
        __builtin_memcpy(out.at, a.at, 64);
        return out;
    }
    static inline I most(I a, I b) {
        return make<I>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
    }
    static inline std::int32_t largest(I a) {
        std::int32_t out = a.at[0];
        for (int i = 1; i < 16; ++i) out = a.at[i] > out ? a.at[i] : out;
        return out;
    }
    static inline void totals(const I* four, std::int32_t* to) {  // the sum of each
        for (int n = 0; n < 4; ++n) {
            to[n] = 0;
            for (int i = 0; i < 16; ++i) to[n] += four[n].at[i];
        }
    }
    static inline F to_float(I a) {
        return make<F>([&](int i) { return static_cast<float>(a.at[i]); });
    }
    static inline I to_whole(F a) {  // to nearest, ties to even; what does not fit gives the smallest integer
        return make<I>([&](int i) {
            const float v = a.at[i];
            return v >= -2147483648.0f && v < 2147483648.0f ? std::int32_t(__builtin_rintf(v)) : INT32_MIN;
        });
    }
    static inline I above(F a, F b) {  // all bits where a > b, else none
        return make<I>([&](int i) { return a.at[i] > b.at[i] ? -1 : 0; });
    }
    static inline F choose(I mask, F yes, F no) {  // of a mask that `above` gave
        return make<F>([&](int i) { return mask.at[i] != 0 ? yes.at[i] : no.at[i]; });
    }
    static inline F as_float(I a) {
        return make<F>([&](int i) { return float_of(std::uint32_t(a.at[i])); });
    }
    static inline void store_bytes(std::int8_t* to, I v) {  // clamped to -128..127
        for (int i = 0; i < 16; ++i) to[i] = std::int8_t(v.at[i] < -128 ? -128 : v.at[i] > 127 ? 127 : v.at[i]);
    }
    static inline void store_shorts(std::int16_t* to, I v) {  // clamped to -32768..32767
        for (int i = 0; i < 16; ++i) to[i] = std::int16_t(v.at[i] < -32768 ? -32768 : v.at[i] > 32767 ? 32767 : v.at[i]);
    }
    static inline I load_bytes(const std::uint8_t* from) {
        return make<I>([&](int i) { return std::int32_t(from[i]); });
    }
    static inline I byte_table(const std::uint8_t* sixteen) {
        I out;
        for (int i = 0; i < 4; ++i) __builtin_memcpy(out.at + 4 * i, sixteen, 16);
        return out;
    }
    static inline I look_up(I table, I indices) {  // every byte of indices, below 16, becomes its entry
        const auto* from = reinterpret_cast<const std::uint8_t*>(table.at);
        I out;
        const auto* at = reinterpret_cast<const std::uint8_t*>(indices.at);
        auto* to = reinterpret_cast<std::uint8_t*>(out.at);
        for (int i = 0; i < 64; ++i) to[i] = from[at[i] & 15];
        return out;
    }
    static inline F float_table(F table, I indices) {  // by the low four bits of every lane
        return make<F>([&](int i) { return table.at[indices.at[i] & 15]; });
    }

    // What is taken off weights before products: instruction sets that multiply signed bytes best take 128. `moved` does it.
    static constexpr std::int32_t kMoved = 0;
    static inline I moved(I weights) { return weights; }
    // sum[r] += the dot product of four moved weights with four signed bytes of activations, which are never -128, in lane r.
    static inline I dot(I sum, I weights, I activations) {
        const auto* w = reinterpret_cast<const std::uint8_t*>(weights.at);
        const auto* x = reinterpret_cast<const std::int8_t*>(activations.at);
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 4; ++j) sum.at[i] += std::int32_t(w[4 * i + j]) * x[4 * i + j];
        return sum;
    }
    // sum[r] += the dot product of two signed shorts of a with two of b, in lane r.
    static inline I dot_shorts(I sum, I a, I b) {
        return make<I>([&](int i) {  // positions that nobody has written may leave 32 bits
            const std::int32_t low = std::int16_t(a.at[i]) * std::int16_t(b.at[i]), high = (a.at[i] >> 16) * (b.at[i] >> 16);
            return std::int32_t(std::uint32_t(sum.at[i]) + std::uint32_t(low) + std::uint32_t(high));
        });
    }
};
