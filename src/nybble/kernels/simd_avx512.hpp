// Sixteen lanes as one AVX-512 register, for codes in storage (body_storage.hpp).

struct Simd {
    static constexpr int W = 16;
    using Float = __m512;
    using Int = __m512i;

    template <int N>
    struct Bytes {
        std::uint8_t at[N];
    };
    template <int B>
    static constexpr Bytes<64> picks() {
        Bytes<64> out{};
        for (int i = 0; i < W; ++i) {
            const int byte = i * B / 8;
            out.at[4 * i] = std::uint8_t(byte);
            out.at[4 * i + 1] = byte + 1 < 16 ? std::uint8_t(byte + 1) : 0x80;
            out.at[4 * i + 2] = out.at[4 * i + 3] = 0x80;
        }
        return out;
    }

    // Lane i gets the two bytes that hold bits [i*B, i*B + B) and shifts its code down; bits above B stay.
    template <int B>
    static inline Int codes(const std::uint8_t* from) {
        if constexpr (B == 8) {
            return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        } else {
            alignas(64) static constexpr Bytes<64> pick = picks<B>();
            const __m512i sixteen = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            const __m512i spread = _mm512_shuffle_epi8(sixteen, _mm512_load_si512(pick.at));
            return _mm512_srlv_epi32(
                spread, _mm512_setr_epi32(0, B & 7, 2 * B & 7, 3 * B & 7, 4 * B & 7, 5 * B & 7, 6 * B & 7, 7 * B & 7, 0,
                                          B & 7, 2 * B & 7, 3 * B & 7, 4 * B & 7, 5 * B & 7, 6 * B & 7, 7 * B & 7));
        }
    }

    template <int B, bool Affine>
    struct Map {
        const float* levels;
        __m512 low, high;  // the first 32 levels
        __m512i shift;
        explicit Map(const Weight& w)
            : levels(w.levels),
              low(_mm512_loadu_ps(w.levels)),
              high(_mm512_loadu_ps(w.levels + 16)),
              shift(_mm512_set1_epi32(w.shift)) {}
        inline Float operator()(Int codes) const {
            if constexpr (B <= 4) {  // vpermps reads four bits; the table repeats
                return _mm512_permutexvar_ps(codes, low);
            } else if constexpr (B == 5) {
                return _mm512_permutex2var_ps(low, codes, high);
            } else {
                const Int code = B == 8 ? codes : _mm512_and_si512(codes, _mm512_set1_epi32((1 << B) - 1));
                if constexpr (Affine)
                    return _mm512_cvtepi32_ps(_mm512_add_epi32(code, shift));
                else
                    return _mm512_i32gather_ps(code, levels, 4);
            }
        }
    };

    static inline Float all(float v) { return _mm512_set1_ps(v); }
    static inline void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
    static inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static inline void halves(const std::uint16_t* from, std::size_t count, float* to) {
        std::size_t i = 0;
        for (; i + 16 <= count; i += 16)
            _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
        if (i < count) {
            const __mmask16 rest = __mmask16((1u << (count - i)) - 1);
            _mm512_mask_storeu_ps(to + i, rest, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, from + i)));
        }
    }
};
