// Eight lanes as one AVX2 register, for codes in storage (body_storage.hpp).

struct Simd {
    static constexpr int W = 8;
    using Float = __m256;
    using Int = __m256i;

    // Lane i gets the two bytes that hold bits [i*B, i*B + B) and shifts its code down; bits above B stay.
    template <int B>
    static inline Int codes(const std::uint8_t* from) {
        if constexpr (B == 8) {
            return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        } else if constexpr (B == 1 || B == 2 || B == 4) {  // all eight codes lie in one 32-bit word
            std::int32_t word;
            __builtin_memcpy(&word, from, 4);
            return _mm256_srlv_epi32(_mm256_set1_epi32(word),
                                     _mm256_setr_epi32(0, B, 2 * B, 3 * B, 4 * B, 5 * B, 6 * B, 7 * B));
        } else {
            alignas(32) static constexpr Bytes<32> pick = picks<B>();
            std::int64_t word;
            __builtin_memcpy(&word, from, 8);
            const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi64x(word),
                                                       _mm256_load_si256(reinterpret_cast<const __m256i*>(pick.at)));
            return _mm256_srlv_epi32(
                spread, _mm256_setr_epi32(0, B & 7, 2 * B & 7, 3 * B & 7, 4 * B & 7, 5 * B & 7, 6 * B & 7, 7 * B & 7));
        }
    }

    template <int N>
    struct Bytes {
        std::uint8_t at[N];
    };
    template <int B>
    static constexpr Bytes<32> picks() {
        Bytes<32> out{};
        for (int i = 0; i < W; ++i) {
            const int byte = i * B / 8;
            out.at[4 * i] = std::uint8_t(byte);
            out.at[4 * i + 1] = byte + 1 < 8 ? std::uint8_t(byte + 1) : 0x80;
            out.at[4 * i + 2] = out.at[4 * i + 3] = 0x80;
        }
        return out;
    }

    template <int B, bool Affine>
    struct Map {
        const float* levels;
        __m256 low, high;  // the first 16 levels
        __m256i shift;
        explicit Map(const Weight& w)
            : levels(w.levels),
              low(_mm256_loadu_ps(w.levels)),
              high(_mm256_loadu_ps(w.levels + 8)),
              shift(_mm256_set1_epi32(w.shift)) {}
        inline Float operator()(Int codes) const {
            if constexpr (B <= 3) {  // vpermps reads three bits; the table repeats
                return _mm256_permutevar8x32_ps(low, codes);
            } else if constexpr (Affine) {
                const Int code = B == 8 ? codes : _mm256_and_si256(codes, _mm256_set1_epi32((1 << B) - 1));
                return _mm256_cvtepi32_ps(_mm256_add_epi32(code, shift));
            } else if constexpr (B == 4) {  // bit 3, moved to the sign, chooses between the halves of the table
                return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
            } else {
                const Int code = B == 8 ? codes : _mm256_and_si256(codes, _mm256_set1_epi32((1 << B) - 1));
                return _mm256_i32gather_ps(levels, code, 4);
            }
        }
    };

    static inline Float all(float v) { return _mm256_set1_ps(v); }
    static inline void store(float* to, Float v) { _mm256_storeu_ps(to, v); }
    static inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static inline void halves(const std::uint16_t* from, std::size_t count, float* to) {
        std::size_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
        for (; i < count; ++i) to[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(from[i])));
    }
};
