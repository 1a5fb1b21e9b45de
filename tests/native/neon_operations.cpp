// Compares every operation on sixteen lanes (lanes_neon.hpp) with plain C++ (lanes_scalar.hpp); neon.cpp says how it is built.
#include "compare.hpp"

// The instruction sets themselves, for their lanes: they are not linked a second time.
#include "../../src/nybble/kernels/isa_scalar.cpp"
#ifdef NYBBLE_ARM64
#include <arm_neon.h>
#undef NYBBLE_ISA
#undef NYBBLE_TABLE
#include "../../src/nybble/kernels/isa_neon.cpp"
#undef NYBBLE_ISA
#undef NYBBLE_TABLE
#include "../../src/nybble/kernels/isa_neondot.cpp"
#endif

namespace nybble {

std::uint16_t half(float v) { return scalar::float_to_half(v); }

#ifdef NYBBLE_ARM64
namespace {

using S = scalar::Lanes;

template <class L>
struct Operations {
    const char* name;
    float x[16] = {}, y[16] = {}, z[16] = {};
    std::int32_t p[16] = {}, q[16] = {};

    void floats(const char* what, typename L::F got, S::F wanted) const {
        std::vector<float> a(16), b(16);
        L::store(a.data(), got);
        S::store(b.data(), wanted);
        same(what, name, b, a);
    }
    void wholes(const char* what, typename L::I got, S::I wanted) const {
        std::vector<std::int32_t> a(16), b(16);
        L::store_line(a.data(), got);
        S::store_line(b.data(), wanted);
        same(what, name, b, a);
    }
    template <int N>
    void shifts() const {
        wholes("right", L::template right<N>(L::line(p)), S::right<N>(S::line(p)));
        wholes("left", L::template left<N>(L::line(p)), S::left<N>(S::line(p)));
        if constexpr (N < 31) shifts<N + 1>();
    }

    void round() {
        for (int i = 0; i < 16; ++i) {
            x[i] = hostile();
            y[i] = below(8) == 0 ? x[i] : hostile();
            z[i] = hostile();
            p[i] = hostile_whole();
            q[i] = hostile_whole();
        }
        const auto a = L::load(x), b = L::load(y), c = L::load(z);
        const auto d = S::load(x), e = S::load(y), f = S::load(z);
        const auto m = L::line(p), n = L::line(q);
        const auto u = S::line(p), v = S::line(q);
        floats("load", a, d);
        floats("all", L::all(x[3]), S::all(x[3]));
        floats("add", L::add(a, b), S::add(d, e));
        floats("sub", L::sub(a, b), S::sub(d, e));
        floats("mul", L::mul(a, b), S::mul(d, e));
        floats("div", L::div(a, b), S::div(d, e));
        floats("fma", L::fma(a, b, c), S::fma(d, e, f));
        floats("max", L::max(a, b), S::max(d, e));
        floats("min", L::min(a, b), S::min(d, e));
        floats("abs", L::abs(a), S::abs(d));
        floats("sqrt", L::sqrt(a), S::sqrt(d));
        floats("to_float", L::to_float(m), S::to_float(u));
        floats("as_float", L::as_float(m), S::as_float(u));
        floats("float_table", L::float_table(a, m), S::float_table(d, u));
        wholes("line", m, u);
        wholes("whole", L::whole(p[0]), S::whole(p[0]));
        wholes("bytes", L::bytes(std::uint8_t(p[0])), S::bytes(std::uint8_t(p[0])));
        wholes("four", L::four(reinterpret_cast<const std::int8_t*>(p) + 3), S::four(reinterpret_cast<const std::int8_t*>(p) + 3));
        wholes("both", L::both(m, n), S::both(u, v));
        wholes("either", L::either(m, n), S::either(u, v));
        wholes("flip", L::flip(m, n), S::flip(u, v));
        wholes("plus", L::plus(m, n), S::plus(u, v));
        wholes("minus", L::minus(m, n), S::minus(u, v));
        wholes("most", L::most(m, n), S::most(u, v));
        wholes("to_whole", L::to_whole(a), S::to_whole(d));
        wholes("as_whole", L::as_whole(a), S::as_whole(d));
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(q);
        wholes("load_bytes", L::load_bytes(bytes), S::load_bytes(bytes));
        wholes("byte_table", L::byte_table(bytes), S::byte_table(bytes));
        wholes("look_up", L::look_up(L::byte_table(bytes), L::both(m, L::bytes(15))),
               S::look_up(S::byte_table(bytes), S::both(u, S::bytes(15))));
        same<std::int32_t>("largest", name, {S::largest(u)}, {L::largest(m)});
        std::vector<std::int8_t> low(16), wanted_low(16);
        L::store_bytes(low.data(), m);
        S::store_bytes(wanted_low.data(), u);
        same("store_bytes", name, wanted_low, low);
        std::vector<std::int16_t> wide(16), wanted_wide(16);
        L::store_shorts(wide.data(), m);
        S::store_shorts(wanted_wide.data(), u);
        same("store_shorts", name, wanted_wide, wide);
        wholes("dot_shorts", L::dot_shorts(m, n, L::line(p)), S::dot_shorts(u, v, S::line(p)));
        halves(x);
        shifts<1>();
        dots();
    }

    // Halves compare as floats again where they are NaN: which NaN does not matter.
    void halves(const float* values) const {
        std::vector<std::uint16_t> a(16), b(16);
        L::store_half(a.data(), L::load(values));
        S::store_half(b.data(), S::load(values));
        for (int i = 0; i < 16; ++i)
            if (values[i] != values[i]) a[i] = b[i] = std::uint16_t((a[i] & 0x7fffu) > 0x7c00u && (b[i] & 0x7fffu) > 0x7c00u ? 0 : i);
        same("store_half", name, b, a);
        floats("load_half", L::load_half(b.data()), S::load_half(b.data()));
        floats("load_bfloat", L::load_bfloat(b.data()), S::load_bfloat(b.data()));
    }

    // Codes of all sizes with activations from -127 to 127, full of the ends of both.
    void dots() {
        std::int32_t sums[16];
        std::uint8_t w[64];
        std::int8_t v[64];
        const int kind = int(below(3));
        for (int i = 0; i < 64; ++i) {
            static const std::uint8_t ends[] = {0, 1, 127, 128, 129, 255};
            w[i] = kind == 0 || below(2) == 0 ? ends[kind == 0 ? i / 16 : below(6)] : std::uint8_t(random_bits());
            v[i] = below(3) == 0 ? std::int8_t(int(below(255)) - 127) : std::int8_t(below(2) == 0 || kind == 0 ? 127 : -127);
        }
        for (auto& s : sums) s = std::int32_t(random_bits()) / 4;
        const auto wanted = [&](const typename S::I& x) {
            const auto moved = S::dot(S::whole(0), S::bytes(std::uint8_t(L::kMoved)), x);
            return S::minus(S::dot(S::line(sums), S::line(w), x), moved);
        };
        const auto line = L::moved(L::line(w));
        wholes("dot", L::dot(L::line(sums), line, L::line(v)), wanted(S::line(v)));
        wholes("dot", L::dot(L::line(sums), line, L::four(v + 5)), wanted(S::four(v + 5)));
        const typename S::I mine[4] = {S::right<6>(S::line(w)), S::right<7>(S::line(w)),
                                         S::right<8>(S::line(w)), S::right<16>(S::line(w))};
        const typename L::I theirs[4] = {L::template right<6>(L::line(w)), L::template right<7>(L::line(w)),
                                         L::template right<8>(L::line(w)), L::template right<16>(L::line(w))};
        std::vector<std::int32_t> a(4), b(4);
        S::totals(mine, a.data());
        L::totals(theirs, b.data());
        same<std::int32_t>("totals", name, a, b);
    }

    void all() {
        for (int i = 0; i < 4000; ++i) round();
        for (std::uint32_t h = 0; h < 65536; h += 16) {
            std::uint16_t at[16];
            for (std::uint32_t i = 0; i < 16; ++i) at[i] = std::uint16_t(h + i);
            floats("load_half", L::load_half(at), S::load_half(at));
            floats("load_bfloat", L::load_bfloat(at), S::load_bfloat(at));
        }
        for (std::uint32_t top = 0; top < 65536; ++top) {  // every sign, exponent and begin of a fraction
            float at[16];
            for (std::uint32_t i = 0; i < 16; ++i) at[i] = float_of(top << 16 | (i < 8 ? 0x0ffcu + i : 0x8ffcu + i - 8));
            halves(at);
        }
    }
};

}  // namespace

void operations() {
    Operations<neon::Lanes>{"neon"}.all();
    Operations<neondot::Lanes>{"neondot"}.all();
}
#else
void operations() {}
#endif

}  // namespace nybble
