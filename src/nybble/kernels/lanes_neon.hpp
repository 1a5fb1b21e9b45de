// Sixteen lanes as four NEON registers. Included inside a namespace of its own (isa_neon.cpp, isa_neondot.cpp).
// What each operation means is said once, in lanes_scalar.hpp.

// One IEEE half as a float, for simd_scalar.hpp.
static inline float half_to_float(std::uint16_t half) {
    __fp16 value;
    __builtin_memcpy(&value, &half, 2);
    return static_cast<float>(value);
}

struct Lanes {
    // Rows of a panel that meet a weight together: 32 registers, of which a row takes twelve (sums of integers, of a block
    // and of the whole) and a line of weights four.
    static constexpr int kPatchTiles = 1, kPatchRows = 2;
    static constexpr int kTokens = 2;
    struct F {
        float32x4_t a, b, c, d;
    };
    struct I {
        int32x4_t a, b, c, d;
    };

    // The same operation on each of the four registers.
    template <class R, class Each, class... V>
    static inline __attribute__((always_inline)) R make(Each each, V... v) {
        return {each(v.a...), each(v.b...), each(v.c...), each(v.d...)};
    }
    static inline uint8x16_t as_bytes(int32x4_t v) { return vreinterpretq_u8_s32(v); }
    static inline int32x4_t of_bytes(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

    static inline F all(float v) {
        const float32x4_t four = vdupq_n_f32(v);
        return {four, four, four, four};
    }
    static inline F load(const float* from) {
        return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
    }
    static inline void store(float* to, F v) {
        vst1q_f32(to, v.a);
        vst1q_f32(to + 4, v.b);
        vst1q_f32(to + 8, v.c);
        vst1q_f32(to + 12, v.d);
    }
    static inline float32x4_t load_four_halves(const std::uint16_t* from) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
    }
    static inline F load_half(const std::uint16_t* from) {
        return {load_four_halves(from), load_four_halves(from + 4), load_four_halves(from + 8), load_four_halves(from + 12)};
    }
    static inline void store_four_halves(std::uint16_t* to, float32x4_t v) {
        vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }
    static inline void store_half(std::uint16_t* to, F v) {
        store_four_halves(to, v.a);
        store_four_halves(to + 4, v.b);
        store_four_halves(to + 8, v.c);
        store_four_halves(to + 12, v.d);
    }
    static inline float32x4_t load_four_bfloats(const std::uint16_t* from) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16));
    }
    static inline F load_bfloat(const std::uint16_t* from) {
        return {load_four_bfloats(from), load_four_bfloats(from + 4), load_four_bfloats(from + 8), load_four_bfloats(from + 12)};
    }
    static inline F add(F x, F y) {
        return make<F>([](auto p, auto q) { return vaddq_f32(p, q); }, x, y);
    }
    static inline F sub(F x, F y) {
        return make<F>([](auto p, auto q) { return vsubq_f32(p, q); }, x, y);
    }
    static inline F mul(F x, F y) {
        return make<F>([](auto p, auto q) { return vmulq_f32(p, q); }, x, y);
    }
    static inline F div(F x, F y) {
        return make<F>([](auto p, auto q) { return vdivq_f32(p, q); }, x, y);
    }
    static inline F fma(F x, F y, F z) {
        return make<F>([](auto p, auto q, auto r) { return vfmaq_f32(r, p, q); }, x, y, z);
    }
    // Compared and chosen: the machine's own maximum gives NaN where either is, and prefers +0.
    static inline F max(F x, F y) {
        return make<F>([](auto p, auto q) { return vbslq_f32(vcgtq_f32(p, q), p, q); }, x, y);
    }
    static inline F min(F x, F y) {
        return make<F>([](auto p, auto q) { return vbslq_f32(vcltq_f32(p, q), p, q); }, x, y);
    }
    static inline F abs(F x) {
        return make<F>([](auto p) { return vabsq_f32(p); }, x);
    }
    static inline F sqrt(F x) {
        return make<F>([](auto p) { return vsqrtq_f32(p); }, x);
    }
    static inline float sum(F x) {
        const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static inline float largest(F x) {
        const auto larger = [](float32x4_t p, float32x4_t q) { return vbslq_f32(vcgtq_f32(p, q), p, q); };
        const float32x4_t four = larger(larger(x.a, x.c), larger(x.b, x.d));
        const float32x2_t low = vget_low_f32(four), high = vget_high_f32(four);
        const float32x2_t two = vbsl_f32(vcgt_f32(low, high), low, high);
        const float first = vget_lane_f32(two, 0), second = vget_lane_f32(two, 1);
        return first > second ? first : second;
    }

    static inline I whole(std::int32_t v) {
        const int32x4_t four = vdupq_n_s32(v);
        return {four, four, four, four};
    }
    static inline I bytes(std::uint8_t v) {
        const int32x4_t four = of_bytes(vdupq_n_u8(v));
        return {four, four, four, four};
    }
    static inline I line(const void* from) {
        const auto* at = static_cast<const std::uint8_t*>(from);
        return {of_bytes(vld1q_u8(at)), of_bytes(vld1q_u8(at + 16)), of_bytes(vld1q_u8(at + 32)), of_bytes(vld1q_u8(at + 48))};
    }
    static inline void store_line(void* to, I v) {
        auto* at = static_cast<std::uint8_t*>(to);
        vst1q_u8(at, as_bytes(v.a));
        vst1q_u8(at + 16, as_bytes(v.b));
        vst1q_u8(at + 32, as_bytes(v.c));
        vst1q_u8(at + 48, as_bytes(v.d));
    }
    static inline I four(const std::int8_t* from) {
        std::int32_t word;
        __builtin_memcpy(&word, from, 4);
        return whole(word);
    }
    static inline I both(I x, I y) {
        return make<I>([](auto p, auto q) { return vandq_s32(p, q); }, x, y);
    }
    static inline I either(I x, I y) {
        return make<I>([](auto p, auto q) { return vorrq_s32(p, q); }, x, y);
    }
    static inline I flip(I x, I y) {
        return make<I>([](auto p, auto q) { return veorq_s32(p, q); }, x, y);
    }
    template <int N>
    static inline I right(I x) {
        return make<I>([](auto p) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(p), N)); }, x);
    }
    template <int N>
    static inline I left(I x) {
        return make<I>([](auto p) { return vshlq_n_s32(p, N); }, x);
    }
    static inline I plus(I x, I y) {
        return make<I>([](auto p, auto q) { return vaddq_s32(p, q); }, x, y);
    }
    static inline I minus(I x, I y) {
        return make<I>([](auto p, auto q) { return vsubq_s32(p, q); }, x, y);
    }
    static inline I as_whole(F x) {
        return make<I>([](auto p) { return vreinterpretq_s32_f32(p); }, x);
    }
    static inline I most(I x, I y) {
        return make<I>([](auto p, auto q) { return vmaxq_s32(p, q); }, x, y);
    }
    static inline std::int32_t largest(I x) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.a, x.b), vmaxq_s32(x.c, x.d))); }
    static inline void totals(const I* four, std::int32_t* to) {
        for (int n = 0; n < 4; ++n)
            to[n] = vaddvq_s32(vaddq_s32(vaddq_s32(four[n].a, four[n].b), vaddq_s32(four[n].c, four[n].d)));
    }
    static inline F to_float(I x) {
        return make<F>([](auto p) { return vcvtq_f32_s32(p); }, x);
    }
    static inline I to_whole(F x) {
        // The conversion saturates; what is too large, and NaN, becomes the smallest integer as everywhere else.
        const float32x4_t end = vdupq_n_f32(2147483648.0f);
        const int32x4_t smallest = vdupq_n_s32(INT32_MIN);
        return make<I>([&](auto p) { return vbslq_s32(vcltq_f32(p, end), vcvtnq_s32_f32(p), smallest); }, x);
    }
    static inline I above(F x, F y) {
        return make<I>([](auto p, auto q) { return vreinterpretq_s32_u32(vcgtq_f32(p, q)); }, x, y);
    }
    static inline F choose(I mask, F yes, F no) {
        return make<F>([](auto m, auto p, auto q) { return vbslq_f32(vreinterpretq_u32_s32(m), p, q); }, mask, yes, no);
    }
    static inline F as_float(I x) {
        return make<F>([](auto p) { return vreinterpretq_f32_s32(p); }, x);
    }
    static inline void store_bytes(std::int8_t* to, I v) {
        const int16x8_t low = vcombine_s16(vqmovn_s32(v.a), vqmovn_s32(v.b));
        const int16x8_t high = vcombine_s16(vqmovn_s32(v.c), vqmovn_s32(v.d));
        vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
    }
    static inline void store_shorts(std::int16_t* to, I v) {
        vst1q_s16(to, vcombine_s16(vqmovn_s32(v.a), vqmovn_s32(v.b)));
        vst1q_s16(to + 8, vcombine_s16(vqmovn_s32(v.c), vqmovn_s32(v.d)));
    }
    static inline int32x4_t widen(uint16x4_t v) { return vreinterpretq_s32_u32(vmovl_u16(v)); }
    static inline I load_bytes(const std::uint8_t* from) {
        const uint8x16_t all = vld1q_u8(from);
        const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_u8(vget_high_u8(all));
        return {widen(vget_low_u16(low)), widen(vget_high_u16(low)), widen(vget_low_u16(high)), widen(vget_high_u16(high))};
    }
    static inline I byte_table(const std::uint8_t* sixteen) {
        const int32x4_t table = of_bytes(vld1q_u8(sixteen));
        return {table, table, table, table};
    }
    static inline I look_up(I table, I indices) {
        return make<I>([](auto t, auto i) { return of_bytes(vqtbl1q_u8(as_bytes(t), as_bytes(i))); }, table, indices);
    }
    static inline F float_table(F table, I indices) {
        // The table as 64 bytes: entry i is bytes 4 i to 4 i + 3.
        const I t = as_whole(table);
        const uint8x16x4_t bytes = {{as_bytes(t.a), as_bytes(t.b), as_bytes(t.c), as_bytes(t.d)}};
        const int32x4_t low = vdupq_n_s32(15), each = vdupq_n_s32(0x04040404), next = vdupq_n_s32(0x03020100);
        return make<F>(
            [&](auto i) {
                const int32x4_t places = vmlaq_s32(next, vandq_s32(i, low), each);
                return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, as_bytes(places)));
            },
            indices);
    }

    // Products of signed bytes only.
    static constexpr std::int32_t kMoved = 128;
    static inline I moved(I weights) { return flip(weights, bytes(0x80)); }
#ifdef NYBBLE_DOT
    static inline int32x4_t products(int32x4_t sum, int32x4_t weights, int32x4_t activations) {
        return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(activations));
    }
#else
    // Two products of bytes meet in 16 bits: 2 * 128 * 127 fits, since activations are never -128 (quantize_row).
    static inline int32x4_t products(int32x4_t sum, int32x4_t weights, int32x4_t activations) {
        const int8x16_t w = vreinterpretq_s8_s32(weights), x = vreinterpretq_s8_s32(activations);
        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
        return vpadalq_s16(sum, vpaddq_s16(low, high));
    }
#endif
    static inline I dot(I sum, I weights, I activations) {
        return make<I>([](auto s, auto w, auto x) { return products(s, w, x); }, sum, weights, activations);
    }
    static inline I dot_shorts(I sum, I a, I b) {
        return make<I>(
            [](auto s, auto p, auto q) {
                const int16x8_t x = vreinterpretq_s16_s32(p), y = vreinterpretq_s16_s32(q);
                const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
                return vaddq_s32(s, vpaddq_s32(low, high));
            },
            sum, a, b);
    }
};
