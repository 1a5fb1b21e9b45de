// The search of scales and codes for blocks of weights: reference_search.py, to the bit, for sixteen runs at once.
// A lane is a run, so every sum runs down the columns in the reference's order. Nothing is fused.

inline constexpr float kSmallest = 7.888609052210118e-31f;  // 2**-100
inline constexpr float kLargest = 3e38f;
inline constexpr float kFlat = 9.5367431640625e-07f;  // 2**-20
inline constexpr int kRounds = 2;
inline constexpr float kStretches[] = {1.0f, 0.85f, 1.2f};
inline constexpr std::size_t kMostBlocks = 16;

inline F zero() { return Lanes::all(0.0f); }
inline F negative(F x) { return Lanes::sub(zero(), x); }
inline F clip(F x, float low, float high) { return Lanes::min(Lanes::max(x, Lanes::all(low)), Lanes::all(high)); }
inline F rounded(F x) { return Lanes::to_float(Lanes::to_whole(x)); }
inline F negative_part(F x) { return Lanes::choose(Lanes::above(x, zero()), zero(), x); }
inline F inverse(F x) {
    return Lanes::choose(Lanes::above(Lanes::abs(x), Lanes::all(kSmallest)), Lanes::div(Lanes::all(1.0f), x), zero());
}
inline F quotient(F x, F y) { return Lanes::choose(Lanes::above(y, zero()), Lanes::div(x, y), zero()); }
inline F larger_of(F x, F y) { return Lanes::choose(Lanes::above(Lanes::abs(x), Lanes::abs(y)), x, y); }
inline F to_half(F x) {
    std::uint16_t halves[16];
    Lanes::store_half(halves, x);
    return Lanes::load_half(halves);
}

// Places of the nearest levels of a table.
inline I table_places(const Levels& levels, F ratio) {
    const F between = Lanes::load(levels.between);
    I at = Lanes::both(Lanes::above(ratio, Lanes::all(levels.between[7])), Lanes::whole(8));
    const auto half_more = [&](int ahead, int step) {
        const F middle = Lanes::float_table(between, Lanes::plus(at, Lanes::whole(ahead)));
        at = Lanes::plus(at, Lanes::both(Lanes::above(ratio, middle), Lanes::whole(step)));
    };
    half_more(3, 4);
    half_more(1, 2);
    half_more(0, 1);
    return at;
}

// Codes less 128, as signed bytes, of quotients.
template <bool Table>
inline I places(const Levels& levels, F ratio) {
    if constexpr (Table) return Lanes::minus(table_places(levels, ratio), Lanes::whole(128));
    const F level = clip(ratio, levels.lowest, levels.highest);
    return Lanes::minus(Lanes::to_whole(level), Lanes::whole(std::int32_t(levels.lowest) + 128));
}

inline F ratio_of(F x, F scale) {
    return Lanes::choose(Lanes::above(Lanes::abs(scale), zero()), Lanes::div(x, scale), zero());
}

template <bool Shifted, bool Table, bool Weighted>
struct Runs {
    struct Sums {
        F a, b, p, q, e;
    };
    struct State {
        F d, dmin, m[kMostBlocks], n[kMostBlocks];
        Sums sums[kMostBlocks];
    };
    struct Grids {
        F s[kMostBlocks], o[kMostBlocks];
    };
    struct Two {
        F s, o;
    };

    const Search& how;
    const float* w;  // [columns, 16]
    const float* h;
    const bool alone;
    F c[kMostBlocks], lowest[kMostBlocks], width[kMostBlocks];

    Runs(const Search& how_, const float* w_, const float* h_) : how(how_), w(w_), h(h_), alone(how_.low == how_.high) {
        for (std::size_t r = 0; r < how.blocks; ++r) measure(r);
    }

    F weight(std::size_t r, std::size_t k) const { return Lanes::load(w + (r * how.block + k) * 16); }
    F importance(std::size_t r, std::size_t k) const {
        if constexpr (!Weighted) return Lanes::all(1.0f);
        return Lanes::load(h + (r * how.block + k) * 16);
    }

    // The importance of a block, and its ends.
    void measure(std::size_t r) {
        F sum = zero(), low = weight(r, 0), high = low, largest = zero();
        for (std::size_t k = 0; k < how.block; ++k) {
            const F x = weight(r, k);
            sum = Lanes::add(sum, importance(r, k));
            low = Lanes::choose(Lanes::above(low, x), x, low);
            high = Lanes::choose(Lanes::above(x, high), x, high);
            largest = larger_of(x, largest);
        }
        c[r] = sum;
        if constexpr (!Shifted) {
            lowest[r] = zero();
            width[r] = largest;
        } else {
            lowest[r] = alone ? low : negative_part(low);
            width[r] = Lanes::sub(high, lowest[r]);
        }
    }

    F nearest_level(F ratio) const {
        if constexpr (Table) return Lanes::float_table(Lanes::load(how.levels.at), table_places(how.levels, ratio));
        return rounded(clip(ratio, how.levels.lowest, how.levels.highest));
    }

    Sums sums(std::size_t r, F s, F o) const {
        const F t = inverse(s);
        Sums sum = {zero(), zero(), zero(), zero(), zero()};
        for (std::size_t k = 0; k < how.block; ++k) {
            F x = weight(r, k);
            if constexpr (Shifted) x = Lanes::sub(x, o);
            const F level = nearest_level(Lanes::mul(x, t));
            const F error = Lanes::sub(x, Lanes::mul(s, level));
            F weighed = level, weighed_error = error;
            if constexpr (Weighted) {
                weighed = Lanes::mul(importance(r, k), level);
                weighed_error = Lanes::mul(importance(r, k), error);
            }
            sum.a = Lanes::add(sum.a, Lanes::mul(weighed, level));
            sum.p = Lanes::add(sum.p, Lanes::mul(weighed_error, level));
            sum.e = Lanes::add(sum.e, Lanes::mul(weighed_error, error));
            if constexpr (Shifted) {
                sum.b = Lanes::add(sum.b, weighed);
                sum.q = Lanes::add(sum.q, weighed_error);
            }
        }
        return sum;
    }

    static Two line(F a, F b, F c, F p, F q) {
        const F by_itself = quotient(p, a);
        if constexpr (!Shifted) return {by_itself, zero()};
        const F product = Lanes::mul(a, c), determinant = Lanes::sub(product, Lanes::mul(b, b));
        const I apart = Lanes::above(determinant, Lanes::mul(Lanes::all(kFlat), product));
        const F divisor = Lanes::choose(apart, determinant, Lanes::all(1.0f));
        const F s = Lanes::div(Lanes::sub(Lanes::mul(c, p), Lanes::mul(b, q)), divisor);
        const F o = Lanes::div(Lanes::sub(Lanes::mul(a, q), Lanes::mul(b, p)), divisor);
        return {Lanes::choose(apart, s, by_itself), Lanes::choose(apart, o, zero())};
    }

    // The least squares fit of a block for its levels; e becomes its error.
    Two settle(std::size_t r, const Sums& sum, F s, F o, F& e) const {
        Two step = line(sum.a, sum.b, c[r], sum.p, sum.q);
        if constexpr (Shifted) {
            if (!alone) {
                const I above = Lanes::above(Lanes::add(o, step.o), zero());
                step.o = Lanes::choose(above, negative(o), step.o);
                step.s = Lanes::choose(above, quotient(Lanes::sub(sum.p, Lanes::mul(sum.b, step.o)), sum.a), step.s);
            }
            const I rises = Lanes::above(Lanes::add(s, step.s), zero());
            step = {Lanes::choose(rises, step.s, zero()), Lanes::choose(rises, step.o, zero())};
        }
        const F by_s = Lanes::sub(Lanes::add(sum.p, sum.p), Lanes::add(Lanes::mul(sum.a, step.s), Lanes::mul(sum.b, step.o)));
        const F by_o = Lanes::sub(Lanes::add(sum.q, sum.q), Lanes::add(Lanes::mul(sum.b, step.s), Lanes::mul(c[r], step.o)));
        e = Lanes::sub(sum.e, Lanes::add(Lanes::mul(step.s, by_s), Lanes::mul(step.o, by_o)));
        return {Lanes::add(s, step.s), Lanes::add(o, step.o)};
    }

    void best_of_tries(Grids& best) const {
        for (std::size_t r = 0; r < how.blocks; ++r) {
            F scale = zero(), offset = zero(), least = Lanes::all(kLargest), e;
            for (std::size_t t = 0; t < how.tries_count; ++t) {
                const F s = Lanes::div(width[r], Lanes::all(how.tries[2 * t]));
                F o = lowest[r];
                if constexpr (Shifted) o = Lanes::add(o, Lanes::mul(s, Lanes::all(how.tries[2 * t + 1])));
                const Two found = settle(r, sums(r, s, o), s, o, e);
                const I better = Lanes::above(least, e);
                scale = Lanes::choose(better, found.s, scale);
                offset = Lanes::choose(better, found.o, offset);
                least = Lanes::choose(better, e, least);
            }
            best.s[r] = scale;
            best.o[r] = offset;
        }
    }

    F multiplier(F wanted, F d) const { return rounded(clip(Lanes::mul(wanted, inverse(d)), how.low, how.high)); }

    F multiples(const F* wanted, const F* bend, F* chosen) const {
        F largest = zero(), best = zero(), least = Lanes::all(kLargest), tried[kMostBlocks];
        for (std::size_t r = 0; r < how.blocks; ++r) {
            largest = larger_of(wanted[r], largest);
            chosen[r] = zero();
        }
        for (std::size_t i = 0; i < how.dividers_count; ++i) {
            const F d = to_half(Lanes::div(largest, Lanes::all(how.dividers[i])));
            F loss = zero();
            for (std::size_t r = 0; r < how.blocks; ++r) {
                tried[r] = multiplier(wanted[r], d);
                const F off = Lanes::sub(wanted[r], Lanes::mul(d, tried[r]));
                loss = Lanes::add(loss, Lanes::mul(bend[r], Lanes::mul(off, off)));
            }
            const I better = Lanes::above(least, loss);
            best = Lanes::choose(better, d, best);
            least = Lanes::choose(better, loss, least);
            for (std::size_t r = 0; r < how.blocks; ++r) chosen[r] = Lanes::choose(better, tried[r], chosen[r]);
        }
        return best;
    }

    F offset_for(std::size_t r, const Sums& sum, F s, F o, F scale) const {
        const F owed = Lanes::sub(sum.q, Lanes::mul(sum.b, Lanes::sub(scale, s)));
        const F wanted = Lanes::add(o, Lanes::div(owed, c[r]));
        return alone ? wanted : negative_part(wanted);
    }

    void evaluate(State& state) const {
        for (std::size_t r = 0; r < how.blocks; ++r)
            state.sums[r] = sums(r, Lanes::mul(state.d, state.m[r]), negative(Lanes::mul(state.dmin, state.n[r])));
    }

    void start(const Grids& grid, bool settled, State& state) const {
        F wanted[kMostBlocks] = {}, bend[kMostBlocks] = {}, e;
        Sums around[kMostBlocks];
        for (std::size_t r = 0; r < how.blocks; ++r) {
            around[r] = sums(r, grid.s[r], grid.o[r]);
            bend[r] = around[r].a;
            if constexpr (Shifted)
                bend[r] = Lanes::sub(around[r].a, Lanes::mul(around[r].b, quotient(around[r].b, c[r])));
            wanted[r] = settled ? settle(r, around[r], grid.s[r], grid.o[r], e).s : grid.s[r];
        }
        state.d = multiples(wanted, bend, state.m);
        state.dmin = zero();
        for (std::size_t r = 0; r < how.blocks; ++r) state.n[r] = zero();
        if constexpr (Shifted) {
            for (std::size_t r = 0; r < how.blocks; ++r) {
                F o = grid.o[r];
                if (settled) o = offset_for(r, around[r], grid.s[r], o, Lanes::mul(state.d, state.m[r]));
                wanted[r] = negative(o);
            }
            state.dmin = multiples(wanted, c, state.n);
        }
        evaluate(state);
    }

    static void take(Sums& mine, const Sums& its, I better) {
        mine = {Lanes::choose(better, its.a, mine.a), Lanes::choose(better, its.b, mine.b), Lanes::choose(better, its.p, mine.p),
                Lanes::choose(better, its.q, mine.q), Lanes::choose(better, its.e, mine.e)};
    }

    void take_block(State& found, const State& other, std::size_t r, I better) const {
        found.m[r] = Lanes::choose(better, other.m[r], found.m[r]);
        found.n[r] = Lanes::choose(better, other.n[r], found.n[r]);
        take(found.sums[r], other.sums[r], better);
    }

    void keep_runs(State& found, const State& other) const {
        F before = zero(), after = zero();
        for (std::size_t r = 0; r < how.blocks; ++r) {
            before = Lanes::add(before, found.sums[r].e);
            after = Lanes::add(after, other.sums[r].e);
        }
        const I better = Lanes::above(before, after);
        found.d = Lanes::choose(better, other.d, found.d);
        found.dmin = Lanes::choose(better, other.dmin, found.dmin);
        for (std::size_t r = 0; r < how.blocks; ++r) take_block(found, other, r, better);
    }

    void refit(State& found, bool anew, float stretch, State& other) const {
        F a = zero(), b = zero(), square = zero(), p = zero(), q = zero(), e;
        for (std::size_t r = 0; r < how.blocks; ++r) {
            const F m = found.m[r], low = negative(found.n[r]);
            const Sums& sum = found.sums[r];
            a = Lanes::add(a, Lanes::mul(Lanes::mul(sum.a, m), m));
            b = Lanes::add(b, Lanes::mul(Lanes::mul(sum.b, m), low));
            square = Lanes::add(square, Lanes::mul(Lanes::mul(c[r], low), low));
            p = Lanes::add(p, Lanes::mul(sum.p, m));
            q = Lanes::add(q, Lanes::mul(sum.q, low));
        }
        const Two step = line(a, b, square, p, q);
        other.d = to_half(Lanes::mul(Lanes::add(found.d, step.s), Lanes::all(stretch)));
        other.dmin = to_half(Lanes::add(found.dmin, step.o));
        if constexpr (Shifted) {
            other.d = Lanes::choose(Lanes::above(other.d, zero()), other.d, found.d);
            if (!alone) other.dmin = Lanes::choose(Lanes::above(other.dmin, zero()), other.dmin, found.dmin);
        }
        for (std::size_t r = 0; r < how.blocks; ++r) {
            other.m[r] = found.m[r];
            other.n[r] = found.n[r];
            if (!anew) continue;
            const F s = Lanes::mul(found.d, found.m[r]), o = negative(Lanes::mul(found.dmin, found.n[r]));
            other.m[r] = multiplier(settle(r, found.sums[r], s, o, e).s, other.d);
            if constexpr (Shifted) {
                const F offset = offset_for(r, found.sums[r], s, o, Lanes::mul(other.d, other.m[r]));
                other.n[r] = multiplier(negative(offset), other.dmin);
            }
        }
        evaluate(other);
        keep_runs(found, other);
    }

    void move(State& found, float i, float j, State& other) const {
        other.d = found.d;
        other.dmin = found.dmin;
        for (std::size_t r = 0; r < how.blocks; ++r) {
            other.m[r] = clip(Lanes::add(found.m[r], Lanes::all(i)), how.low, how.high);
            other.n[r] = found.n[r];
            if (j != 0.0f) {
                other.n[r] = clip(Lanes::add(found.n[r], Lanes::all(j)), how.low, how.high);
            } else if constexpr (Shifted) {
                const F s = Lanes::mul(found.d, found.m[r]), o = negative(Lanes::mul(found.dmin, found.n[r]));
                const F offset = offset_for(r, found.sums[r], s, o, Lanes::mul(found.d, other.m[r]));
                other.n[r] = multiplier(negative(offset), found.dmin);
            }
        }
        evaluate(other);
        for (std::size_t r = 0; r < how.blocks; ++r)
            take_block(found, other, r, Lanes::above(found.sums[r].e, other.sums[r].e));
    }

    void search(State& found) const {
        State other;
        Grids grid = {};
        for (std::size_t t = 0; t < how.plains; ++t) {
            for (std::size_t r = 0; r < how.blocks; ++r) {
                grid.s[r] = Lanes::div(width[r], Lanes::all(how.tries[2 * t]));
                grid.o[r] = lowest[r];
            }
            start(grid, false, t == 0 ? found : other);
            if (t != 0) keep_runs(found, other);
        }
        best_of_tries(grid);
        start(grid, true, other);
        keep_runs(found, other);
        for (int round = 0; round < kRounds; ++round) {
            for (int i = 0; i < (alone ? 1 : 3); ++i) refit(found, true, kStretches[i], other);
            if (alone) continue;
            move(found, -1.0f, 0.0f, other);
            move(found, 1.0f, 0.0f, other);
            if constexpr (Shifted) {
                move(found, 0.0f, -1.0f, other);
                move(found, 0.0f, 1.0f, other);
            }
        }
        refit(found, false, 1.0f, other);
    }

    void write(const State& found, const SixteenRuns& runs, std::uint8_t* codes) const {
        Lanes::store_half(runs.d, found.d);
        Lanes::store_half(runs.dmin, found.dmin);
        for (std::size_t r = 0; r < how.blocks; ++r) {
            Lanes::store_bytes(runs.m + 16 * r, Lanes::to_whole(found.m[r]));
            Lanes::store_bytes(runs.n + 16 * r, Lanes::to_whole(found.n[r]));
            const F s = Lanes::mul(found.d, found.m[r]), o = negative(Lanes::mul(found.dmin, found.n[r]));
            for (std::size_t k = 0; k < how.block; ++k) {
                F x = weight(r, k);
                if constexpr (Shifted) x = Lanes::sub(x, o);
                Lanes::store_bytes(reinterpret_cast<std::int8_t*>(codes) + (r * how.block + k) * 16,
                                   places<Table>(how.levels, ratio_of(x, s)));
            }
        }
        for (int lane = 0; lane < 16; ++lane)
            if (runs.codes[lane] != nullptr)
                for (std::size_t k = 0; k < how.blocks * how.block; ++k) runs.codes[lane][k] = codes[k * 16 + lane] ^ 0x80;
    }
};

inline void lay_lanes(const float* const* from, std::size_t columns, float* to) {
    for (std::size_t k = 0; k < columns; ++k)
        for (int lane = 0; lane < 16; ++lane) to[k * 16 + lane] = from[lane][k];
}

template <bool Shifted, bool Table, bool Weighted>
inline void search_sixteen(const Search& how, const SixteenRuns& runs) {
    alignas(64) float w[256 * 16];
    alignas(64) float h[Weighted ? 256 * 16 : 16];
    alignas(64) std::uint8_t codes[256 * 16];
    const std::size_t columns = how.blocks * how.block;
    lay_lanes(runs.weight, columns, w);
    if constexpr (Weighted) lay_lanes(runs.importance, columns, h);
    using Searched = Runs<Shifted, Table, Weighted>;
    const Searched searched(how, w, h);
    typename Searched::State found;
    searched.search(found);
    searched.write(found, runs, codes);
}

static void search_runs(const Search& how, const SixteenRuns& runs) {
    const auto with = [&]<bool Shifted, bool Table>() {
        if (runs.importance[0] != nullptr)
            search_sixteen<Shifted, Table, true>(how, runs);
        else
            search_sixteen<Shifted, Table, false>(how, runs);
    };
    if (how.shifted)
        with.template operator()<true, false>();
    else if (how.levels.whole)
        with.template operator()<false, false>();
    else
        with.template operator()<false, true>();
}

template <bool Table>
inline void nearest_places(const Levels& levels, const float* weight, std::size_t columns, std::size_t block, const float* scale,
                           const float* offset, std::uint8_t* codes) {
    for (std::size_t start = 0, b = 0; start < columns; start += block, ++b) {
        const std::size_t end = start + block < columns ? start + block : columns;
        const F s = Lanes::all(scale[b]), o = Lanes::all(offset == nullptr ? 0.0f : offset[b]);
        for (std::size_t k = start; k < end; k += 16) {
            const std::size_t count = end - k < 16 ? end - k : 16;
            float x[16] = {};
            std::int8_t found[16];
            __builtin_memcpy(x, weight + k, count * sizeof(float));
            F value = Lanes::load(x);
            if (offset != nullptr) value = Lanes::sub(value, o);
            Lanes::store_bytes(found, places<Table>(levels, ratio_of(value, s)));
            for (std::size_t i = 0; i < count; ++i) codes[k + i] = std::uint8_t(found[i]) ^ 0x80;
        }
    }
}

static void nearest_row(const Levels& levels, const float* weight, std::size_t columns, std::size_t block, const float* scale,
                        const float* offset, std::uint8_t* codes) {
    if (levels.whole)
        nearest_places<false>(levels, weight, columns, block, scale, offset, codes);
    else
        nearest_places<true>(levels, weight, columns, block, scale, offset, codes);
}
