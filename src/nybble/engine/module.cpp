// The Python face of the engine. Private: nybble.engine.decoder checks arguments and words the errors; what is checked again
// here only keeps a wrong call from touching memory that is not its own.
#include "../kernels/bind.hpp"
#include "../kernels/cpu.hpp"
#include "engine.hpp"
#include "sample.hpp"

#include <stdexcept>

namespace nybble {
namespace {

using Ids = Vector<const std::int64_t>;
using WeightPtr = std::shared_ptr<LaidWeight>;
using Floats = std::vector<float>;

Buffer buffer(const std::string& name) {
    static const char* const names[] = {"residual", "normed", "projected", "mixed", "inner", "logits"};
    for (std::size_t i = 0; i < kBuffers; ++i)
        if (name == names[i]) return static_cast<Buffer>(i);
    throw nb::value_error("unknown buffer");
}

Activation activation(const std::string& name) {
    static const char* const names[] = {"none", "gelu", "gelu_tanh", "gelu_quick", "silu", "relu"};
    for (std::size_t i = 0; i < 6; ++i)
        if (name == names[i]) return static_cast<Activation>(i);
    throw nb::value_error("unknown activation");
}

CacheType cache_type(const std::string& name) {
    static const char* const names[] = {"f32", "f16", "int16", "int8", "int4"};
    for (std::size_t i = 0; i < 5; ++i)
        if (name == names[i]) return static_cast<CacheType>(i);
    throw nb::value_error("unknown cache type");
}

void add_embed(Engine& e, WeightPtr tokens, WeightPtr positions, std::int64_t offset, float scale) {
    Op op{};
    op.kind = Op::Kind::embed;
    op.embed = {std::move(tokens), std::move(positions), offset, scale};
    e.append(std::move(op));
}

void add_norm(Engine& e, const std::string& from, const std::string& to, bool centred, float eps, Floats gain, Floats bias) {
    require(!gain.empty() && (bias.empty() || bias.size() == gain.size()), "gain and bias must be as long as the row");
    Op op{};
    op.kind = Op::Kind::norm;
    op.norm = {buffer(from), buffer(to), centred, eps, std::move(gain), std::move(bias)};
    e.append(std::move(op));
}

void add_linear(Engine& e, const std::string& from, const std::string& to, const std::vector<WeightPtr>& weights,
                const std::vector<Floats>& biases, const std::string& act, bool add, bool gated, float scale) {
    require(!weights.empty() && weights.size() == biases.size(), "as many biases as weights (empty for none)");
    require(!gated || (weights.size() == 2 && weights[0]->tiled.rows == weights[1]->tiled.rows), "a gated layer has two equal weights");
    Op op{};
    op.kind = Op::Kind::linear;
    op.linear.from = buffer(from);
    op.linear.to = buffer(to);
    op.linear.activation = activation(act);
    op.linear.add = add;
    op.linear.gated = gated;
    op.linear.scale = scale;
    std::size_t column = 0;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const Tiled& w = weights[i]->tiled;
        require(w.columns == weights[0]->tiled.columns, "weights that run together must have the same columns");
        require(biases[i].empty() || biases[i].size() == w.rows, "a bias must be as long as its weight has rows");
        Floats bias = biases[i].empty() ? Floats() : padded(biases[i].data(), w.rows, w.tiles * kRows);
        op.linear.parts.push_back({weights[i], std::move(bias), column});
        if (!gated) column += w.rows;
    }
    e.append(std::move(op));
}

void add_attention(Engine& e, std::size_t layer, std::size_t heads, std::size_t shared, std::size_t dimensions, Floats frequencies,
                   bool interleaved, float scale, float cap, std::size_t window, Floats query_gain, Floats key_gain, float eps) {
    require(shared >= 1 && heads % shared == 0 && dimensions >= 1, "heads must be a multiple of the key-value heads");
    require(2 * frequencies.size() <= dimensions, "more frequencies than half the dimensions of a head");
    require(query_gain.empty() || query_gain.size() == dimensions, "query gain must be as long as a head");
    require(key_gain.empty() || key_gain.size() == dimensions, "key gain must be as long as a head");
    Op op{};
    op.kind = Op::Kind::attention;
    Attention& a = op.attention;
    a.layer = layer;
    a.heads = heads;
    a.shared = shared;
    a.dimensions = dimensions;
    a.rotary = 2 * frequencies.size();
    if (a.rotary != 0) a.rotation = e.rotation(std::move(frequencies));
    a.interleaved = interleaved;
    a.scale = scale;
    a.cap = cap;
    a.window = window;
    a.query_gain = std::move(query_gain);
    a.key_gain = std::move(key_gain);
    a.norm_eps = eps;
    e.append(std::move(op));
}

void add_add(Engine& e, const std::string& from, const std::string& to) {
    Op op{};
    op.kind = Op::Kind::add;
    op.add = {buffer(from), buffer(to)};
    e.append(std::move(op));
}

void add_select(Engine& e) {
    Op op{};
    op.kind = Op::Kind::select;
    e.append(std::move(op));
}

void add_cap(Engine& e, float cap) {
    Op op{};
    op.kind = Op::Kind::cap;
    op.cap.cap = cap;
    e.append(std::move(op));
}

void run(Engine& e, const Ids& tokens, const Ids& positions, const Ids& sequences, const Ids& wanted, const Matrix<float>& logits) {
    const std::size_t rows = tokens.shape(0);
    require(rows >= 1 && rows <= e.most_rows() && positions.shape(0) == rows && sequences.shape(0) == rows, "wrong number of rows");
    require(logits.shape(0) == wanted.shape(0) && (wanted.shape(0) == 0 || logits.shape(1) == e.vocabulary()), "logits have the wrong shape");
    for (std::size_t i = 0; i < rows; ++i) {
        require(tokens.data()[i] >= 0 && std::size_t(tokens.data()[i]) < e.vocabulary(), "token out of range");
        require(positions.data()[i] >= 0 && std::size_t(positions.data()[i]) < e.positions(), "position out of range");
        require(sequences.data()[i] >= 0 && std::size_t(sequences.data()[i]) < e.sequences(), "sequence out of range");
    }
    for (std::size_t i = 0; i < wanted.shape(0); ++i)
        require(wanted.data()[i] >= 0 && std::size_t(wanted.data()[i]) < rows && (i == 0 || wanted.data()[i] > wanted.data()[i - 1]),
                "wanted rows must ascend and exist");
    const Step step = {rows, tokens.data(), positions.data(), sequences.data(), wanted.shape(0), wanted.data(), logits.data()};
    nb::gil_scoped_release release;
    e.run(step);
}

// The first of the largest logits of each row; -1 where they are not all finite.
void best(const Matrix<const float>& logits, const Vector<std::int64_t>& out) {
    require(out.shape(0) == logits.shape(0), "out has the wrong shape");
    for (std::size_t m = 0; m < logits.shape(0); ++m) {
        const std::size_t at = kernels().best_of(logits.data() + m * logits.shape(1), logits.shape(1));
        out.data()[m] = at == logits.shape(1) ? -1 : std::int64_t(at);
    }
}

std::int64_t sample(const Vector<const float>& logits, const Ids& history, double temperature, std::size_t top_k, double top_p,
                    double min_p, double repetition_penalty, double u) {
    require(logits.shape(0) >= 1, "no logits");
    for (std::size_t i = 0; i < history.shape(0); ++i)
        require(history.data()[i] >= 0 && std::size_t(history.data()[i]) < logits.shape(0), "token out of range");
    const Sampling how = {temperature, top_k, top_p, min_p, repetition_penalty};
    nb::gil_scoped_release release;
    return choose(logits.data(), logits.shape(0), history.data(), history.shape(0), how, u);
}

}  // namespace

void bind_engine(nb::module_& m) {
    nb::class_<Engine>(m, "Engine", "Runs a decoder's program; use nybble.engine.Decoder, which checks arguments.")
        .def("__init__",
             [](Engine* self, int threads, bool exact, const std::string& cache) {
                 new (self) Engine(threads_for(threads), exact, cache_type(cache));
             },
             nb::arg("threads"), nb::arg("exact"), nb::arg("cache"))
        .def("embed", &add_embed, nb::arg("tokens"), nb::arg("positions").none(), nb::arg("position_offset"), nb::arg("scale"))
        .def("norm", &add_norm, nb::arg("source"), nb::arg("target"), nb::arg("centred"), nb::arg("eps"), nb::arg("gain"), nb::arg("bias"))
        .def("linear", &add_linear, nb::arg("source"), nb::arg("target"), nb::arg("weights"), nb::arg("biases"), nb::arg("activation"),
             nb::arg("add"), nb::arg("gated"), nb::arg("scale"))
        .def("attention", &add_attention, nb::arg("layer"), nb::arg("heads"), nb::arg("shared"), nb::arg("dimensions"),
             nb::arg("frequencies"), nb::arg("interleaved"), nb::arg("scale"), nb::arg("cap"), nb::arg("window"),
             nb::arg("query_gain"), nb::arg("key_gain"), nb::arg("norm_eps"))
        .def("add", &add_add, nb::arg("source"), nb::arg("target"))
        .def("select", &add_select)
        .def("cap", &add_cap, nb::arg("cap"))
        .def("finish", &Engine::finish, nb::arg("vocabulary"), nb::arg("rows"))
        .def("reserve", &Engine::reserve, nb::arg("sequences"), nb::arg("positions"))
        .def("run", &run, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(), nb::arg("sequences").noconvert(),
             nb::arg("wanted").noconvert(), nb::arg("logits").noconvert())
        .def_prop_ro("most_rows", &Engine::most_rows)
        .def_prop_ro("position_bytes", &Engine::position_bytes);
    m.def("best", &best, nb::arg("logits").noconvert(), nb::arg("out").noconvert());
    m.def("choose", &sample, nb::arg("logits").noconvert(), nb::arg("history").noconvert(), nb::arg("temperature"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("min_p"), nb::arg("repetition_penalty"), nb::arg("u"));
}

}  // namespace nybble
