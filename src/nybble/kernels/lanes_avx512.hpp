// Sixteen lanes as one AVX-512 register. Included inside a namespace of its own (isa_avx512.cpp, isa_avx512vnni.cpp).
// What each operation means is said once, in lanes_scalar.hpp.

struct Lanes {
#ifdef NYBBLE_VNNI
    static constexpr int kTokens = 8;  // rows of x that meet a weight together: 8 sums of integers, of a block and of the row, of 32
#else
    static constexpr int kTokens = 4;
#endif
    static constexpr int kPatchTiles = kTokens == 8 ? 2 : 1, kPatchRows = kTokens;
    using F = __m512;
    using I = __m512i;

    static inline F all(float v) { return _mm512_set1_ps(v); }
    static inline F load(const float* from) { return _mm512_loadu_ps(from); }
    static inline void store(float* to, F v) { _mm512_storeu_ps(to, v); }
    static inline F load_half(const std::uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static inline void store_half(std::uint16_t* to, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static inline F load_bfloat(const std::uint16_t* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
    static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
    static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
    static inline F min(F a, F b) { return _mm512_min_ps(a, b); }
    static inline F abs(F a) { return _mm512_abs_ps(a); }
    static inline float sum(F a) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static inline float largest(F a) {
        const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static inline __m256 upper(F a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
    static inline F sqrt(F a) { return _mm512_sqrt_ps(a); }

    static inline I whole(std::int32_t v) { return _mm512_set1_epi32(v); }
    static inline I bytes(std::uint8_t v) { return _mm512_set1_epi8(static_cast<char>(v)); }
    static inline I line(const void* from) { return _mm512_loadu_si512(from); }
    static inline void store_line(void* to, I v) { _mm512_storeu_si512(to, v); }
    static inline I four(const std::int8_t* from) {
        std::int32_t word;
        __builtin_memcpy(&word, from, 4);
        return _mm512_set1_epi32(word);
    }
    static inline I both(I a, I b) { return _mm512_and_si512(a, b); }
    static inline I either(I a, I b) { return _mm512_or_si512(a, b); }
    static inline I flip(I a, I b) { return _mm512_xor_si512(a, b); }
    template <int N>
    static inline I right(I a) {
        return _mm512_srli_epi32(a, N);
    }
    template <int N>
    static inline I left(I a) {
        return _mm512_slli_epi32(a, N);
    }
    static inline I plus(I a, I b) { return _mm512_add_epi32(a, b); }
    static inline I minus(I a, I b) { return _mm512_sub_epi32(a, b); }
    static inline I as_whole(F a) { return _mm512_castps_si512(a); }
    static inline I most(I a, I b) { return _mm512_max_epi32(a, b); }
    static inline std::int32_t largest(I a) { return _mm512_reduce_max_epi32(a); }
    static inline void totals(const I* four, std::int32_t* to) {
        const auto pairs = [](I a, I b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); };
        const I ab = pairs(four[0], four[1]), cd = pairs(four[2], four[3]);
        const I all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                         _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
    }
    static inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static inline I to_whole(F a) { return _mm512_cvtps_epi32(a); }
    static inline I above(F a, F b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }
    static inline F choose(I mask, F yes, F no) { return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(mask), yes); }
    static inline F as_float(I a) { return _mm512_castsi512_ps(a); }
    static inline void store_bytes(std::int8_t* to, I v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(v));
    }
    static inline void store_shorts(std::int16_t* to, I v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(v));
    }
    static inline I load_bytes(const std::uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static inline I byte_table(const std::uint8_t* sixteen) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
    }
    static inline I look_up(I table, I indices) { return _mm512_shuffle_epi8(table, indices); }
    static inline F float_table(F table, I indices) { return _mm512_permutexvar_ps(indices, table); }

#ifdef NYBBLE_VNNI
    static constexpr std::int32_t kMoved = 0;
    static inline I moved(I weights) { return weights; }
    static inline I dot(I sum, I weights, I activations) { return _mm512_dpbusd_epi32(sum, weights, activations); }
#else
    static constexpr std::int32_t kMoved = 128;
    static inline I moved(I weights) { return flip(weights, bytes(0x80)); }
    static inline I dot(I sum, I weights, I activations) {
        // The multiply-add of bytes takes unsigned ones first. Magnitudes of moved weights are: 2 * 128 * 127 does not saturate.
        const I signs = _mm512_mask_sub_epi8(activations, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), activations);
        const I pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), signs);
        return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
#endif
    static inline I dot_shorts(I sum, I a, I b) {
#ifdef NYBBLE_VNNI
        return _mm512_dpwssd_epi32(sum, a, b);
#else
        return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
    }
};
