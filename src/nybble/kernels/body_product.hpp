// Products y = x W^T with a weight in the kernel layout. Included once per instruction set, after Lanes and body_layout.
//
// Two modes. Exact: activations are floats, every weight is decoded to a float (scale * level, as decode gives it) and
// multiplied in order of its column, in two sums (even and odd columns) a row. Fast: activations are int8 with a float scale
// a block of 64 columns. A part, 64 columns or the 32 or 16 that share a scale, is summed as integers, exactly; then
//
//     block = fma(integer sum, weight scale, block)        for each part; with an offset also fma(sum of codes, shift, block)
//     total = fma(block, activation scale, total)          for each block
//
// in float32. Where one scale serves the row it is 1 above and the total is multiplied by it. Where a block has several parts
// and levels are symmetric and of at most four bits, scales are whole numbers of 15 bits times a power of two of the row (the
// step): sums fit 16 bits, so their products with scales are integers as well, two parts at once, and the total is multiplied
// by the step. A half that is at least 2**-4 of the largest scale of its row is such a number exactly; what others lose is at
// most 2**-15 of the largest. No order depends on M, tiles or threads, so prefill and decoding, one thread or eight, give the
// same bits.

inline void put(const Output& out, std::size_t row, std::size_t count, std::size_t m, const float* sums, int tokens) {
    const F bias = out.bias == nullptr ? Lanes::all(0.0f) : Lanes::load(out.bias + row);
    const F scale = Lanes::all(out.scale);
    for (int t = 0; t < tokens; ++t) {
        float* to = out.to + (m + std::size_t(t)) * out.stride + row;
        F y = Lanes::add(Lanes::mul(Lanes::load(sums + t * int(kRows)), scale), bias);
        if (out.activation != Activation::none) y = activate(y, out.activation);
        if (out.add) y = Lanes::add(load_some(to, count), y);
        if (out.times) y = Lanes::mul(load_some(to, count), y);
        store_some(to, y, count);
    }
}

template <int B, bool Table, int M>
inline void fast_tiles(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                       std::size_t last, const Corrections& c) {
    alignas(64) float sums[M * kRows];
    const int tokens = x.count - m < std::size_t(M) ? int(x.count - m) : M;
    for (std::size_t tile = first; tile < last; ++tile) {
        if (w.part == 64)
            fast_tile<B, Table, M, 1>(w, tile, x, m, c, sums);
        else if (w.part == 32)
            fast_tile<B, Table, M, 2>(w, tile, x, m, c, sums);
        else
            fast_tile<B, Table, M, 4>(w, tile, x, m, c, sums);
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, tokens);
    }
}

template <int M>
static void fast_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                       std::size_t last, const Corrections& c) {
    if (w.table) return fast_tiles<4, true, M>(w, x, m, out, first, last, c);
    switch (w.bits) {
        case 2: return fast_tiles<2, false, M>(w, x, m, out, first, last, c);
        case 3: return fast_tiles<3, false, M>(w, x, m, out, first, last, c);
        case 4: return fast_tiles<4, false, M>(w, x, m, out, first, last, c);
        case 5: return fast_tiles<5, false, M>(w, x, m, out, first, last, c);
        case 6: return fast_tiles<6, false, M>(w, x, m, out, first, last, c);
        case 7: return fast_tiles<7, false, M>(w, x, m, out, first, last, c);
        default: return fast_tiles<8, false, M>(w, x, m, out, first, last, c);
    }
}

// All panels against tiles [first, last), which lie unpacked in `bytes`: two tiles after the other, which stay in the first
// cache while panels, smaller than they are, come from the second.
template <Scales How, int Parts>
static void panels(const Tiled& w, const std::uint8_t* bytes, const Activations& x, const Output& out, std::size_t first,
                   std::size_t last, const Corrections& c) {
    constexpr int tiles = Lanes::kPatchTiles, rows = Lanes::kPatchRows;
    alignas(64) float sums[tiles * kPanel * kRows];
    for (std::size_t tile = first; tile < last;) {
        const std::uint8_t* at = bytes + (tile - first) * unpacked_bytes(w);
        const std::size_t together = last - tile < tiles ? 1 : tiles;
        for (std::size_t m = 0; m < x.count; m += kPanel) {
            const std::size_t tokens = x.count - m < kPanel ? x.count - m : kPanel;
            for (std::size_t t = 0; t < tokens; ++t)  // the products take long enough for these to come
                for (std::size_t i = 0; i < together; ++i)
                    __builtin_prefetch(out.to + (m + t) * out.stride + (tile + i) * kRows, 1);
            const auto multiply = [&]<int T>() __attribute__((always_inline)) {
                if constexpr (rows == int(kPanel))
                    if (tokens <= kPanel / 2) return panel_tile<How, Parts, T, rows / 2>(w, tile, at, x, m, 0, c, sums);
                for (std::size_t row = 0; row < tokens; row += rows) panel_tile<How, Parts, T, rows>(w, tile, at, x, m, row, c, sums);
            };
            if (together == tiles)
                multiply.template operator()<tiles>();
            else
                multiply.template operator()<1>();
            for (std::size_t i = 0; i < together; ++i) {
                const std::size_t row = (tile + i) * kRows;
                put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums + i * kPanel * kRows, int(tokens));
            }
        }
        tile += together;
    }
}

template <int M>
static void exact_group(const Tiled& w, const Activations& x, std::size_t m, const Output& out, std::size_t first,
                        std::size_t last) {
    alignas(64) float sums[M * kRows];
    for (std::size_t tile = first; tile < last; ++tile) {
        if constexpr (M == 1)
            exact_one(w, tile, x, m, sums);
        else
            exact_tile<M>(w, tile, x, m, sums);
        const std::size_t row = tile * kRows;
        put(out, row, w.rows - row < kRows ? w.rows - row : kRows, m, sums, M);
    }
}

// Tiles [first, last) for all tokens. fast needs a weight of codes, x.codes and a scratch that was prepared.
static void product(const Tiled& w, const Activations& x, const Output& out, std::size_t first, std::size_t last, bool fast,
                    void* scratch) {
    if (fast && in_panels(x.count)) {
        const Corrections c = corrections(w, x, scratch);
        if (on_the_way(x.count)) {
            const std::size_t chunk = w.tile_bytes == 0 || w.tile_bytes > kKept ? 1 : kKept / w.tile_bytes;
            for (std::size_t begin = first; begin < last; begin += chunk)
                for (std::size_t m = 0; m < x.count; m += kPanel)
                    fast_group<Lanes::kTokens >= 4 ? 8 : 1>(w, x, m, out, begin, last - begin < chunk ? last : begin + chunk, c);
            return;
        }
        // So many tiles that they stay in the second cache while one panel after the other meets them.
        const std::size_t tile_bytes = unpacked_bytes(w), chunk = tile_bytes == 0 || tile_bytes > kKept ? 1 : kKept / tile_bytes;
        auto* bytes = static_cast<std::uint8_t*>(scratch) + correction_bytes(w, x.count);
        for (std::size_t begin = first; begin < last; begin += chunk) {
            const std::size_t end = last - begin < chunk ? last : begin + chunk;
            for (std::size_t tile = begin; tile < end; ++tile) widen(w, tile, bytes + (tile - begin) * tile_bytes);
            if (scaled_by_row(w) && w.offset == nullptr)
                panels<Scales::row, 1>(w, bytes, x, out, begin, end, c);
            else if (w.part == 64)
                panels<Scales::parts, 1>(w, bytes, x, out, begin, end, c);
            else if (w.part == 32 && w.steps != nullptr)
                panels<Scales::whole, 2>(w, bytes, x, out, begin, end, c);
            else if (w.part == 32)
                panels<Scales::parts, 2>(w, bytes, x, out, begin, end, c);
            else if (w.steps != nullptr)
                panels<Scales::whole, 4>(w, bytes, x, out, begin, end, c);
            else
                panels<Scales::parts, 4>(w, bytes, x, out, begin, end, c);
        }
        return;
    }
    if (fast) {
        const Corrections c = corrections(w, x, scratch);
        if (Lanes::kTokens >= 4 && x.count == 4) return fast_group<4>(w, x, 0, out, first, last, c);
        for (std::size_t m = 0; m < x.count; ++m) fast_group<1>(w, x, m, out, first, last, c);
        return;
    }
    const std::size_t chunk = w.tile_bytes == 0 || w.tile_bytes > kKept ? 1 : kKept / w.tile_bytes;
    for (std::size_t begin = first; begin < last; begin += chunk) {
        const std::size_t end = last - begin < chunk ? last : begin + chunk;
        std::size_t m = 0;
        if constexpr (Lanes::kTokens >= 8)
            for (; m + 8 <= x.count; m += 8) exact_group<8>(w, x, m, out, begin, end);
        if constexpr (Lanes::kTokens >= 4)
            for (; m + 4 <= x.count; m += 4) exact_group<4>(w, x, m, out, begin, end);
        for (; m < x.count; ++m) exact_group<1>(w, x, m, out, begin, end);
    }
}
