// Eight lanes in plain C++, for codes in storage (body_storage.hpp).

struct Simd {
    static constexpr int W = 8;
    struct Float {
        float lane[W];
    };
    struct Int {
        std::uint32_t lane[W];
    };

    template <int B>
    static inline Int codes(const std::uint8_t* from) {
        std::uint64_t word;
        __builtin_memcpy(&word, from, 8);
        Int out;
        for (int i = 0; i < W; ++i) out.lane[i] = std::uint32_t(word >> (i * B)) & ((1u << B) - 1);
        return out;
    }

    template <int B, bool Affine>
    struct Map {
        const float* levels;
        std::int32_t shift;
        explicit Map(const Weight& w) : levels(w.levels), shift(w.shift) {}
        inline Float operator()(const Int& codes) const {
            Float out;
            for (int i = 0; i < W; ++i) {
                if constexpr (Affine)
                    out.lane[i] = float(std::int32_t(codes.lane[i]) + shift);
                else
                    out.lane[i] = levels[codes.lane[i]];
            }
            return out;
        }
    };

    static inline Float all(float v) {
        Float out;
        for (int i = 0; i < W; ++i) out.lane[i] = v;
        return out;
    }
    static inline void store(float* to, const Float& v) { __builtin_memcpy(to, v.lane, sizeof v.lane); }
    static inline Float mul(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    static inline Float add(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] += b.lane[i];
        return a;
    }
    static inline Float sub(Float a, const Float& b) {
        for (int i = 0; i < W; ++i) a.lane[i] -= b.lane[i];
        return a;
    }
    static inline void halves(const std::uint16_t* from, std::size_t count, float* to) {
        for (std::size_t i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
    }
};
