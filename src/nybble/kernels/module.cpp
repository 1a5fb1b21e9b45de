// The Python face of the kernels: codes as stored, the choice of an instruction set, memory bandwidth.
//
// Private: nybble.kernels checks arguments and words the errors. Outputs are arrays that the caller made.
#include "bind.hpp"
#include "cpu.hpp"
#include "weight.hpp"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nybble;

namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> out;
    for (const Kernels* k : usable()) out.emplace_back(k->name);
    return out;
}

void choose(const std::string& name) {
    if (!select(name)) throw nb::value_error("this machine cannot run that instruction set");
}

// Splits rows into fixed chunks of about 64 thousand weights, at least one row; each row's result is its own.
template <class F>
void over_rows(const Weight& w, std::size_t rows, int threads, F task) {
    const std::size_t chunk = std::max<std::size_t>(1, 65536 / std::max<std::size_t>(1, w.columns));
    const std::size_t chunks = (rows + chunk - 1) / chunk;
    const std::size_t each = (scratch_bytes(w) + 127) / 64 * 64;
    const Aligned scratch(each * static_cast<std::size_t>(threads));
    parallel(chunks, threads, [&](std::size_t c, int worker) {
        task(c * chunk, std::min(rows, (c + 1) * chunk),
             static_cast<char*>(scratch.data) + each * static_cast<std::size_t>(worker));
    });
}

void pack(const Matrix<const std::uint8_t>& codes, const Matrix<std::uint8_t>& packed, int bits) {
    require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    const std::size_t rows = codes.shape(0), columns = codes.shape(1);
    require(packed.shape(0) == rows && packed.shape(1) == (columns * std::size_t(bits) + 7) / 8,
            "packed has the wrong shape");
    nb::gil_scoped_release release;
    kernels().pack(codes.data(), packed.data(), rows, columns, bits);
}

void unpack(const Matrix<const std::uint8_t>& packed, const Matrix<std::uint8_t>& codes, int bits) {
    require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
    const std::size_t rows = codes.shape(0), columns = codes.shape(1);
    require(packed.shape(0) == rows && packed.shape(1) == (columns * std::size_t(bits) + 7) / 8,
            "packed has the wrong shape");
    nb::gil_scoped_release release;
    kernels().unpack(packed.data(), codes.data(), rows, columns, bits);
}

void decode(const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits, const Vector<const float>& levels,
            std::size_t block, const Any& scale, const std::optional<Any>& offset, bool shifted,
            const Matrix<float>& out, int threads) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset, shifted);
    const Weight& w = bound.weight;
    require(out.shape(0) == w.rows && out.shape(1) == columns, "out has the wrong shape");
    threads = threads_for(threads);
    float* to = out.data();
    nb::gil_scoped_release release;
    const Kernels& run = kernels();
    over_rows(w, w.rows, threads, [&](std::size_t first, std::size_t last, void* scratch) {
        for (std::size_t n = first; n < last; ++n) run.decode_row(w, n, to + n * columns, scratch);
    });
}

void gather(const Vector<const std::int64_t>& rows, const Matrix<const std::uint8_t>& packed, std::size_t columns,
            int bits, const Vector<const float>& levels, std::size_t block, const Any& scale,
            const std::optional<Any>& offset, bool shifted, const Matrix<float>& out) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset, shifted);
    const Weight& w = bound.weight;
    require(out.shape(0) == rows.shape(0) && out.shape(1) == columns, "out has the wrong shape");
    for (std::size_t i = 0; i < rows.shape(0); ++i)
        if (rows.data()[i] < 0 || static_cast<std::size_t>(rows.data()[i]) >= w.rows)
            throw nb::index_error("row out of range");
    float* to = out.data();
    nb::gil_scoped_release release;
    const Aligned scratch(scratch_bytes(w));
    for (std::size_t i = 0; i < rows.shape(0); ++i)
        kernels().decode_row(w, static_cast<std::size_t>(rows.data()[i]), to + i * columns, scratch.data);
}

double read_bandwidth(std::size_t bytes, int threads, int repeats) {
    constexpr std::size_t piece = std::size_t(1) << 20;
    require(bytes >= 8 && repeats >= 1, "bytes must be at least 8 and repeats at least 1");
    threads = threads_for(threads);
    nb::gil_scoped_release release;
    const std::size_t words = bytes / 8, step = piece / 8, pieces = (words + step - 1) / step;
    const Memory buffer(words * 8, true);  // as weights lie: small pages read a fifth slower
    auto* data = buffer.as<std::uint64_t>();
    parallel(pieces, threads, [&](std::size_t p, int) {
        for (std::size_t i = p * step; i < std::min(words, (p + 1) * step); ++i) data[i] = i;
    });
    const Kernels& run = kernels();
    std::atomic<std::uint64_t> total{0};  // uses the sums, so that no compiler drops the reads
    double best = 0.0;
    for (int r = 0; r < repeats; ++r) {
        const auto start = std::chrono::steady_clock::now();
        parallel(pieces, threads, [&](std::size_t p, int) {
            total.fetch_add(run.sum(data + p * step, std::min(words, (p + 1) * step) - p * step),
                            std::memory_order_relaxed);
        });
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (seconds > 0.0) best = std::max(best, static_cast<double>(words * 8) / seconds);
    }
    const std::uint64_t n = words;
    const std::uint64_t once = (n % 2 == 0) ? (n / 2) * (n - 1) : n * ((n - 1) / 2);
    if (total.load() != once * static_cast<std::uint64_t>(repeats))
        throw std::runtime_error("the buffer read back differs from what was written");
    return best;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "C++ kernels of nybble; use nybble.kernels, which checks arguments.";
    m.def("instruction_sets", &instruction_sets);
    m.def("instruction_set", [] { return std::string(kernels().name); });
    m.def("select", &choose, nb::arg("name"));
    m.def("pack", &pack, nb::arg("codes").noconvert(), nb::arg("packed").noconvert(), nb::arg("bits"));
    m.def("unpack", &unpack, nb::arg("packed").noconvert(), nb::arg("codes").noconvert(), nb::arg("bits"));
    m.def("decode", &decode, nb::arg("packed").noconvert(), nb::arg("columns"), nb::arg("bits"),
          nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("offset").noconvert().none(), nb::arg("shifted"), nb::arg("out").noconvert(), nb::arg("threads"));
    m.def("gather", &gather, nb::arg("rows").noconvert(), nb::arg("packed").noconvert(), nb::arg("columns"),
          nb::arg("bits"), nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
          nb::arg("offset").noconvert().none(), nb::arg("shifted"), nb::arg("out").noconvert());
    bind_weights(m);
    bind_search(m);
    bind_engine(m);
    m.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"), nb::arg("repeats"));
}
