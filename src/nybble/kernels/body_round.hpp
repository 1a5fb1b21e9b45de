// Plain rounding of blocks as ggml does it: reference_round.py, to the bit, for sixteen blocks at once. A lane is a block.

// The whole number towards zero, of numbers from 0; what is no finite number becomes 0.
inline F truncated(F x) {
    x = Lanes::choose(Lanes::above(Lanes::all(kLargest), Lanes::abs(x)), x, zero());
    const F near = rounded(x);
    return Lanes::choose(Lanes::above(near, x), Lanes::sub(near, Lanes::all(1.0f)), near);
}

// The nearest whole number, halves away from zero.
inline F rounded_away(F x) {
    x = Lanes::choose(Lanes::above(Lanes::all(kLargest), Lanes::abs(x)), x, zero());
    const F size = Lanes::abs(x), even = rounded(size);
    const F whole = Lanes::choose(Lanes::above(Lanes::sub(size, even), Lanes::all(0.4999999701976776f)),
                                  Lanes::add(even, Lanes::all(1.0f)), even);
    return Lanes::choose(Lanes::above(zero(), x), negative(whole), whole);
}

template <RoundBy Rule>
inline void round_lanes(const SixteenBlocks& blocks) {
    constexpr std::size_t most = 256;
    alignas(64) float w[most * 16];
    alignas(64) std::uint8_t codes[most * 16];
    lay_lanes(blocks.weight, blocks.block, w);
    const float top = float((1 << blocks.bits) - 1);
    F low = Lanes::load(w), high = low, largest = zero();
    for (std::size_t k = 0; k < blocks.block; ++k) {
        const F x = Lanes::load(w + 16 * k);
        low = Lanes::choose(Lanes::above(low, x), x, low);
        high = Lanes::choose(Lanes::above(x, high), x, high);
        largest = larger_of(x, largest);
    }
    F scale, shift = zero(), up;
    if constexpr (Rule == RoundBy::range) {
        scale = Lanes::div(Lanes::sub(high, low), Lanes::all(top));
        shift = low;
        up = Lanes::all(0.5f);
    } else if constexpr (Rule == RoundBy::ends) {
        scale = Lanes::div(largest, Lanes::all(-float(1 << (blocks.bits - 1))));
        up = Lanes::all(float(1 << (blocks.bits - 1)) + 0.5f);
    } else {
        scale = Lanes::div(Lanes::abs(largest), Lanes::all(float((1 << (blocks.bits - 1)) - 1)));
        up = Lanes::all(float(1 << (blocks.bits - 1)));
    }
    const F some = Lanes::abs(scale);
    const F turned = Lanes::choose(Lanes::above(some, zero()), Lanes::div(Lanes::all(1.0f), scale), zero());
    for (std::size_t k = 0; k < blocks.block; ++k) {
        F x = Lanes::load(w + 16 * k);
        if constexpr (Rule == RoundBy::range) x = Lanes::sub(x, shift);
        const F steps = Lanes::mul(x, turned);
        F code;
        if constexpr (Rule == RoundBy::away)
            code = Lanes::add(rounded_away(steps), up);
        else
            code = Lanes::min(truncated(Lanes::add(steps, up)), Lanes::all(top));
        Lanes::store_bytes(reinterpret_cast<std::int8_t*>(codes) + 16 * k,
                           Lanes::minus(Lanes::to_whole(code), Lanes::whole(128)));
    }
    Lanes::store(blocks.scale, scale);
    Lanes::store(blocks.shift, shift);
    for (int lane = 0; lane < 16; ++lane)
        if (blocks.codes[lane] != nullptr)
            for (std::size_t k = 0; k < blocks.block; ++k) blocks.codes[lane][k] = codes[k * 16 + lane] ^ 0x80;
}

static void round_sixteen(const SixteenBlocks& blocks, RoundBy rule) {
    if (rule == RoundBy::range)
        round_lanes<RoundBy::range>(blocks);
    else if (rule == RoundBy::ends)
        round_lanes<RoundBy::ends>(blocks);
    else
        round_lanes<RoundBy::away>(blocks);
}
