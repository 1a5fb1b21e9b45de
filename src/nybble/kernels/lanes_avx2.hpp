// Sixteen lanes as two AVX2 registers. Included inside a namespace of its own (isa_avx2.cpp, isa_avx2vnni.cpp).
// What each operation means is said once, in lanes_scalar.hpp.

struct Lanes {
    static constexpr int kPatchTiles = 1, kPatchRows = 4;
    static constexpr int kTokens = 1;  // rows of x that meet a weight together outside panels: 16 registers, two a sum
    struct F {
        __m256 low, high;
    };
    struct I {
        __m256i low, high;
    };

    static inline F all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static inline F load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static inline void store(float* to, F v) {
        _mm256_storeu_ps(to, v.low);
        _mm256_storeu_ps(to + 8, v.high);
    }
    static inline F load_half(const std::uint16_t* from) {
        const auto* at = reinterpret_cast<const __m128i*>(from);
        return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
    }
    static inline void store_half(std::uint16_t* to, F v) {
        auto* at = reinterpret_cast<__m128i*>(to);
        _mm_storeu_si128(at, _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm_storeu_si128(at + 1, _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static inline F load_bfloat(const std::uint16_t* from) {
        const auto* at = reinterpret_cast<const __m128i*>(from);
        const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at)), 16);
        const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1)), 16);
        return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
    }
    static inline F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static inline F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static inline F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static inline F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    static inline F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static inline F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static inline F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
    static inline F abs(F a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
    }
    static inline float sum(F a) {
        const __m256 eight = _mm256_add_ps(a.low, a.high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static inline float largest(F a) {
        const __m256 eight = _mm256_max_ps(a.low, a.high);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static inline F sqrt(F a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }

    static inline I whole(std::int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    static inline I bytes(std::uint8_t v) {
        return {_mm256_set1_epi8(static_cast<char>(v)), _mm256_set1_epi8(static_cast<char>(v))};
    }
    static inline I line(const void* from) {
        const auto* at = static_cast<const __m256i*>(from);
        return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
    }
    static inline void store_line(void* to, I v) {
        auto* at = static_cast<__m256i*>(to);
        _mm256_storeu_si256(at, v.low);
        _mm256_storeu_si256(at + 1, v.high);
    }
    static inline I four(const std::int8_t* from) {
        std::int32_t word;
        __builtin_memcpy(&word, from, 4);
        return whole(word);
    }
    static inline I both(I a, I b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
    static inline I either(I a, I b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
    static inline I flip(I a, I b) { return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)}; }
    template <int N>
    static inline I right(I a) {
        return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)};
    }
    template <int N>
    static inline I left(I a) {
        return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)};
    }
    static inline I plus(I a, I b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
    static inline I minus(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
    static inline I as_whole(F a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
    static inline I most(I a, I b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
    static inline std::int32_t largest(I a) {
        const __m256i eight = _mm256_max_epi32(a.low, a.high);
        const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static inline void totals(const I* four, std::int32_t* to) {
        __m256i eight[4];
        for (int n = 0; n < 4; ++n) eight[n] = _mm256_add_epi32(four[n].low, four[n].high);
        const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[0], eight[1]), _mm256_hadd_epi32(eight[2], eight[3]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
    }
    static inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
    static inline I to_whole(F a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
    static inline I above(F a, F b) {
        return {_mm256_castps_si256(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ)),
                _mm256_castps_si256(_mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ))};
    }
    static inline F choose(I mask, F yes, F no) {
        return {_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(mask.low)),
                _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(mask.high))};
    }
    static inline F as_float(I a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
    static inline void store_bytes(std::int8_t* to, I v) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.low, v.high), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    static inline void store_shorts(std::int16_t* to, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(_mm256_packs_epi32(v.low, v.high), 0xd8));
    }
    static inline I load_bytes(const std::uint8_t* from) {
        return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8)))};
    }
    static inline I byte_table(const std::uint8_t* sixteen) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
        return {table, table};
    }
    static inline I look_up(I table, I indices) {
        return {_mm256_shuffle_epi8(table.low, indices.low), _mm256_shuffle_epi8(table.high, indices.high)};
    }
    static inline __m256 look_up_eight(F table, __m256i indices) {
        const __m256 low = _mm256_permutevar8x32_ps(table.low, indices), high = _mm256_permutevar8x32_ps(table.high, indices);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
    }
    static inline F float_table(F table, I indices) {
        return {look_up_eight(table, indices.low), look_up_eight(table, indices.high)};
    }

#ifdef NYBBLE_VNNI
    static constexpr std::int32_t kMoved = 0;
    static inline I moved(I weights) { return weights; }
#else
    static constexpr std::int32_t kMoved = 128;
    static inline I moved(I weights) { return flip(weights, bytes(0x80)); }
#endif
    static inline __m256i dot_eight(__m256i sum, __m256i weights, __m256i activations) {
#ifdef NYBBLE_VNNI
        return _mm256_dpbusd_avx_epi32(sum, weights, activations);
#else
        // The multiply-add of bytes takes unsigned ones first. Magnitudes of moved weights are: 2 * 128 * 127 does not saturate.
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(activations, weights));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
    }
    static inline I dot(I sum, I weights, I activations) {
        return {dot_eight(sum.low, weights.low, activations.low), dot_eight(sum.high, weights.high, activations.high)};
    }
    static inline I dot_shorts(I sum, I a, I b) {
#ifdef NYBBLE_VNNI
        return {_mm256_dpwssd_avx_epi32(sum.low, a.low, b.low), _mm256_dpwssd_avx_epi32(sum.high, a.high, b.high)};
#else
        return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
                _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
#endif
    }
};
