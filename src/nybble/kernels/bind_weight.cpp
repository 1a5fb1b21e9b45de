// The Python face of weights in the kernel layout.
#include "bind.hpp"
#include "cpu.hpp"
#include "weight.hpp"

#include <cstring>

namespace nybble {
namespace {

using Ids = Vector<const std::int64_t>;

std::shared_ptr<LaidWeight> from_codes(const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
                                       const Vector<const float>& levels, std::size_t block, const Any& scale,
                                       const std::optional<Any>& offset, bool shifted, bool drop, int threads) {
    Bound bound;
    bind(bound, packed, columns, bits, levels, block, scale, offset, shifted);
    threads = threads_for(threads);
    nb::gil_scoped_release release;
    return std::make_shared<LaidWeight>(bound.weight, drop, threads);
}

// Scales [rows, blocks] of codes and outer halves in the place of floats; the offset's may be absent.
std::shared_ptr<LaidWeight> from_nested(const Matrix<const std::uint8_t>& packed, std::size_t columns, int bits,
                                        const Vector<const float>& levels, std::size_t block,
                                        const Matrix<const std::uint8_t>& scale, const Any& scale_outer, int scale_bias,
                                        const std::optional<Matrix<const std::uint8_t>>& offset,
                                        const std::optional<Any>& offset_outer, bool drop, int threads) {
    Bound bound;
    Weight& w = bound.weight;
    bind_codes(bound, packed, columns, bits, levels, block);
    require(block >= 1 && columns % block == 0 && scale.shape(0) == w.rows && scale.shape(1) == w.blocks, "scale must be [rows, blocks]");
    NestedSource nested[2] = {};
    const auto inner = [&](const Matrix<const std::uint8_t>& codes, const Any& outer, int bias) -> NestedSource {
        require(codes.shape(0) == w.rows && codes.shape(1) == w.blocks && is_half(outer) && outer.shape(0) == w.rows, "codes and outer must have a row a row");
        const std::size_t count = outer.shape(1), per = count == 0 ? 0 : w.blocks / count;
        require(per >= 1 && per * count == w.blocks && (per & (per - 1)) == 0, "blocks must be a power of two times outer scales");
        return {codes.data(), static_cast<const std::uint16_t*>(outer.data()), bias, per};
    };
    nested[0] = inner(scale, scale_outer, scale_bias);
    require(offset.has_value() == offset_outer.has_value(), "offset needs codes and outer");
    if (offset) nested[1] = inner(*offset, *offset_outer, 0);
    threads = threads_for(threads);
    nb::gil_scoped_release release;
    return std::make_shared<LaidWeight>(w, drop, threads, nested);
}

std::shared_ptr<LaidWeight> from_floats(const Any& values, const std::string& kind, bool transposed, bool drop, int threads) {
    FloatSource source;
    source.values = values.data();
    source.holds = kind == "f32" ? Holds::f32 : kind == "f16" ? Holds::f16 : Holds::bf16;
    require(kind == "f32" || kind == "f16" || kind == "bf16", "kind must be f32, f16 or bf16");
    require(values.dtype().bits == (kind == "f32" ? 32 : 16) && values.dtype().lanes == 1, "values have another width");
    source.rows = values.shape(transposed ? 1 : 0);
    source.columns = values.shape(transposed ? 0 : 1);
    source.transposed = transposed;
    threads = threads_for(threads);
    nb::gil_scoped_release release;
    return std::make_shared<LaidWeight>(source, drop, threads);
}

void product(const LaidWeight& weight, const Matrix<const float>& x, const Matrix<float>& y, bool exact, int threads) {
    const Tiled& w = weight.tiled;
    require(x.shape(1) == w.columns && y.shape(0) == x.shape(0) && y.shape(1) == w.rows, "x or y has the wrong shape");
    threads = threads_for(threads);
    const bool fast = !exact && w.holds == Holds::codes;
    const std::size_t count = x.shape(0), stride = (w.columns + kBlock - 1) / kBlock * kBlock, most = count + kPanel;
    const float* from = x.data();
    float* to = y.data();
    nb::gil_scoped_release release;
    const Kernels& run = kernels();
    // Kept from call to call: to ask the system for it each time costs more than a small product.
    thread_local Memory values, codes, scale, sums, scratch;
    const auto room = [](Memory& memory, std::size_t bytes) {
        if (memory.bytes() < bytes) memory = Memory(bytes);
    };
    const std::size_t each = (product_scratch(w, count) + 127) / 64 * 64;
    room(scratch, each * std::size_t(threads));
    if (fast) {
        room(codes, most * stride);
        room(scale, most * stride / kBlock * sizeof(float));
        room(sums, most * stride / 16 * sizeof(std::int32_t));
    } else {
        room(values, count * stride * sizeof(float));
    }
    for (std::size_t m = 0; m < count; ++m) {
        if (fast)
            run.quantize_row(from + m * w.columns, w.columns,
                             {codes.as<std::int8_t>(), scale.as<float>(), sums.as<std::int32_t>(), stride, count, m});
        else  // what lies behind the last column is never multiplied
            std::memcpy(values.as<float>() + m * stride, from + m * w.columns, w.columns * sizeof(float));
    }
    const Activations laid = {count, stride, values.as<float>(), codes.as<std::int8_t>(), scale.as<float>(), sums.as<std::int32_t>()};
    Output out;
    out.to = to;
    out.stride = w.rows;
    const std::size_t pairs = (w.tiles + 1) / 2, pieces = std::min(pairs, std::size_t(threads) * (count >= 32 ? 8 : 1));
    if (count == 0 || pieces == 0) return;
    std::uint8_t* all = scratch.as();  // the caller's, shared out to the pool
    std::vector<char> prepared(std::size_t(threads), 0);
    parallel(pieces, threads, [&](std::size_t p, int worker) {
        std::uint8_t* mine = all + each * std::size_t(worker);
        if (fast && !prepared[std::size_t(worker)]) run.prepare(w, laid, mine);
        prepared[std::size_t(worker)] = 1;
        run.product(w, laid, out, 2 * (pairs * p / pieces), std::min(w.tiles, 2 * (pairs * (p + 1) / pieces)), fast, mine);
    });
}

void rows(const LaidWeight& weight, const Ids& ids, const Matrix<float>& out) {
    const Tiled& w = weight.tiled;
    require(out.shape(0) == ids.shape(0) && out.shape(1) == w.columns, "out has the wrong shape");
    for (std::size_t i = 0; i < ids.shape(0); ++i)
        if (ids.data()[i] < 0 || static_cast<std::size_t>(ids.data()[i]) >= w.rows) throw nb::index_error("row out of range");
    nb::gil_scoped_release release;
    for (std::size_t i = 0; i < ids.shape(0); ++i)
        kernels().tiled_row(w, static_cast<std::size_t>(ids.data()[i]), out.data() + i * w.columns);
}

void restore(const LaidWeight& weight, const Matrix<std::uint8_t>& packed, const std::optional<Any>& scale,
             const std::optional<Any>& offset, int threads) {
    const Tiled& w = weight.tiled;
    require(w.holds == Holds::codes, "a float weight has no codes");
    require(packed.shape(0) == w.rows && packed.shape(1) == (w.columns * std::size_t(w.bits) + 7) / 8, "packed has the wrong shape");
    const auto fits = [&](const Any& a, bool half) {
        return is_half(a) == half && a.shape(0) == weight.parameter_rows && a.shape(1) == w.blocks;
    };
    const bool nested = w.nested_scale.codes != nullptr;
    require(scale.has_value() != nested && offset.has_value() == (!nested && w.offset != nullptr), "scale has the wrong shape or type, or offset is missing");
    if (scale) require(fits(*scale, w.scale_half), "scale has the wrong shape or type");
    if (offset) require(fits(*offset, w.offset_half), "offset has the wrong shape or type");
    threads = threads_for(threads);
    void* to = scale ? const_cast<void*>(scale->data()) : nullptr;
    void* second = offset ? const_cast<void*>(offset->data()) : nullptr;
    nb::gil_scoped_release release;
    weight.restore(packed.data(), to, second, threads);
}

// int8 codes of x [M, K] in blocks of 64, as products in fast mode make them.
void quantize(const Matrix<const float>& x, const Matrix<std::int8_t>& codes, const Matrix<float>& scale) {
    const std::size_t blocks = (x.shape(1) + kBlock - 1) / kBlock;
    require(codes.shape(0) == x.shape(0) && codes.shape(1) == blocks * kBlock && scale.shape(0) == x.shape(0) && scale.shape(1) == blocks,
            "codes or scale has the wrong shape");
    std::vector<std::int32_t> sums(blocks * 4);
    for (std::size_t m = 0; m < x.shape(0); ++m)
        kernels().quantize_row(x.data() + m * x.shape(1), x.shape(1),
                               {codes.data() + m * blocks * kBlock, scale.data() + m * blocks, sums.data(), blocks * kBlock, 1, 0});
}

}  // namespace

void bind_weights(nb::module_& m) {
    nb::class_<LaidWeight>(m, "Weight", "A weight [N, K] in the kernel layout.")
        .def_static("from_codes", &from_codes, nb::arg("packed").noconvert(), nb::arg("columns"), nb::arg("bits"),
                    nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
                    nb::arg("offset").noconvert().none(), nb::arg("shifted"), nb::arg("drop"), nb::arg("threads"))
        .def_static("from_nested", &from_nested, nb::arg("packed").noconvert(), nb::arg("columns"), nb::arg("bits"),
                    nb::arg("levels").noconvert(), nb::arg("block"), nb::arg("scale").noconvert(),
                    nb::arg("scale_outer").noconvert(), nb::arg("scale_bias"), nb::arg("offset").noconvert().none(),
                    nb::arg("offset_outer").noconvert().none(), nb::arg("drop"), nb::arg("threads"))
        .def_static("from_floats", &from_floats, nb::arg("values").noconvert(), nb::arg("kind"), nb::arg("transposed"),
                    nb::arg("drop"), nb::arg("threads"))
        .def_prop_ro("rows", [](const LaidWeight& w) { return w.tiled.rows; })
        .def_prop_ro("columns", [](const LaidWeight& w) { return w.tiled.columns; })
        .def_prop_ro("bits", [](const LaidWeight& w) { return w.tiled.bits; })
        .def_prop_ro("holds_codes", [](const LaidWeight& w) { return w.tiled.holds == Holds::codes; })
        .def_prop_ro("nbytes", &LaidWeight::bytes)
        .def("product", &product, nb::arg("x").noconvert(), nb::arg("y").noconvert(), nb::arg("exact"), nb::arg("threads"))
        .def("gather", &rows, nb::arg("rows").noconvert(), nb::arg("out").noconvert())
        .def("restore", &restore, nb::arg("packed").noconvert(), nb::arg("scale").noconvert().none(),
             nb::arg("offset").noconvert().none(), nb::arg("threads"));
    m.def("quantize_activations", &quantize, nb::arg("x").noconvert(), nb::arg("codes").noconvert(), nb::arg("scale").noconvert());
}

}  // namespace nybble
