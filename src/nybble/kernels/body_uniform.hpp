// Whole-number codes of a weight: the ends of its blocks, and the steps nearest to weight / scale; reference_uniform.py, to the
// bit. Quotients are doubles: a float divided by a float is then rounded once, where it becomes a whole number.

static void extremes_row(const float* weight, std::size_t columns, std::size_t block, float* low, float* high) {
    for (std::size_t start = 0, b = 0; start < columns; start += block, ++b) {
        const std::size_t count = block < columns - start ? block : columns - start;
        const float* from = weight + start;
        float least = from[0], most = from[0];
        std::size_t k = 0;
        if (count >= 16) {
            F lowest = Lanes::load(from), highest = lowest;
            for (k = 16; k + 16 <= count; k += 16) {
                const F x = Lanes::load(from + k);
                lowest = Lanes::min(x, lowest);
                highest = Lanes::max(x, highest);
            }
            alignas(64) float ends[2][16];
            Lanes::store(ends[0], lowest);
            Lanes::store(ends[1], highest);
            for (int lane = 0; lane < 16; ++lane) {
                least = ends[0][lane] < least ? ends[0][lane] : least;
                most = ends[1][lane] > most ? ends[1][lane] : most;
            }
        }
        for (; k < count; ++k) {
            least = from[k] < least ? from[k] : least;
            most = from[k] > most ? from[k] : most;
        }
        low[b] = least;
        high[b] = most;
    }
}

static void uniform_row(const float* weight, std::size_t columns, std::size_t block, const float* scale, const float* zero,
                        double middle, double top, std::uint8_t* codes) {
    for (std::size_t start = 0, b = 0; start < columns; start += block, ++b) {
        const std::size_t count = block < columns - start ? block : columns - start;
        const double divisor = scale[b] == 0.0f ? 1.0 : double(scale[b]), up = zero == nullptr ? middle : double(zero[b]);
        const float* from = weight + start;
        std::uint8_t* to = codes + start;
        for (std::size_t k = 0; k < count; ++k) {
            double step = __builtin_rint(double(from[k]) / divisor) + up;
            step = step > 0.0 ? step : 0.0;
            step = step < top ? step : top;
            to[k] = std::uint8_t(int(step));
        }
    }
}
