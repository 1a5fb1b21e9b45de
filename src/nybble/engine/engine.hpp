// Runs a decoder, token by token or many at once: a list of operations over a few buffers, made from the architecture's
// table (program.py), executed by a pool of threads that meet at a barrier after each operation.
//
// A run takes M rows (tokens), each with its position and its sequence, in any mixture: one row a sequence when many texts
// go on at once, many rows of one sequence when a prompt is read. Every row's result depends on its own text alone, to the
// bit: not on the other rows, the number of threads, or how a prompt was cut into runs.
#pragma once

#include "../kernels/threads.hpp"
#include "../kernels/weight.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace nybble {

// Row-wise storage that operations read and write. Rows are padded with zeros to whole blocks of 64 values.
enum class Buffer : std::uint8_t { residual, normed, projected, mixed, inner, logits };
inline constexpr std::size_t kBuffers = 6;

struct Embed {
    std::shared_ptr<LaidWeight> tokens;
    std::shared_ptr<LaidWeight> positions;  // or nullptr
    std::int64_t position_offset = 0;       // added to a position before the look-up (OPT)
    float scale = 1.0f;
};

struct Norm {
    Buffer from, to;
    bool centred;
    float eps;
    std::vector<float> gain, bias;  // empty: 1 and 0
};

struct Part {  // one matrix of a linear operation, or some tiles of it
    std::shared_ptr<LaidWeight> weight;
    std::vector<float> bias;  // padded to whole tiles, or empty
    std::size_t column;       // where its rows go in the output
    std::size_t first = 0, last = 0;  // its tiles
    bool wanted_only = false; // queries of the last attention: of no use for rows whose logits nobody wants
};

struct Linear {
    Buffer from, to;
    std::vector<Part> parts;
    Activation activation = Activation::none;
    bool add = false;    // to the output
    bool gated = false;  // two parts: activation(first) * second
    float scale = 1.0f;
};

struct Attention {
    std::size_t layer;
    std::size_t heads, shared;  // query heads, key-value heads
    std::size_t dimensions;
    std::size_t rotary = 0;     // leading dimensions that are rotated; 0: none
    std::size_t rotation = 0;   // index of the frequencies
    bool interleaved = false;   // pairs are (2 i, 2 i + 1) instead of (i, i + rotary / 2)
    float scale = 1.0f, cap = 0.0f;
    std::size_t window = 0;     // positions seen, the own one included; 0: all
    std::vector<float> query_gain, key_gain;  // RMS norm of each head, or empty
    float norm_eps = 1e-6f;
};

struct Add {
    Buffer from, to;
};

struct Cap {  // logits = cap * tanh(logits / cap)
    float cap;
};

struct Op {
    enum class Kind : std::uint8_t { embed, norm, linear, attention, add, select, cap } kind;
    Embed embed;
    Norm norm;
    Linear linear;
    Attention attention;
    Add add;
    Cap cap;
};

struct Step {  // one run
    std::size_t rows;
    const std::int64_t* tokens;
    const std::int64_t* positions;
    const std::int64_t* sequences;
    std::size_t wanted_count;
    const std::int64_t* wanted;  // rows whose logits are wanted, ascending
    float* logits;               // [wanted_count, vocabulary]
};

class Engine {
  public:
    Engine(int threads, bool exact, CacheType cache);

    std::size_t rotation(std::vector<float> frequencies);  // [rotary / 2]; returns its index
    void append(Op op);
    // Ends the program: sizes the buffers, for runs of at most `rows` rows.
    void finish(std::size_t vocabulary, std::size_t rows);
    // Room for so many sequences of so many positions; drops what was cached.
    void reserve(std::size_t sequences, std::size_t positions);
    // The caller has checked tokens, positions (below the reserved ones) and sequences. Runs of one engine must not overlap.
    void run(const Step& step);

    std::size_t most_rows() const { return most_; }
    std::size_t vocabulary() const { return vocabulary_; }
    std::size_t sequences() const { return sequences_; }
    std::size_t positions() const { return capacity_; }
    std::size_t cache_bytes() const;
    std::size_t position_bytes() const;  // of the cache, for one position

  private:
    struct Rows {  // [M, stride] floats, and their codes
        Memory values, codes, scale, sums;
        std::size_t columns = 0, stride = 0;
        void allocate(std::size_t rows, std::size_t columns, bool quantized);
        void quantize(const Kernels& run, const float* row, std::size_t columns, std::size_t rows, std::size_t m) const;
        Activations view(std::size_t rows) const;
    };
    struct Worker {
        Rows normed;  // the few rows of a decoding step: made by every thread for itself, to save a barrier
        Rows source;  // codes of another buffer
        Memory scratch;
        Memory head;    // one head's cache as floats, for the many queries of a prompt
    };
    struct State;

    void work(int worker, State& state);
    void embed(const Embed& op, State& state, int worker);
    void norm(const Norm& op, State& state, int worker);
    void linear(const Linear& op, std::size_t index, State& state, int worker);
    void attention(const Attention& op, std::size_t index, State& state, int worker);
    void set_queries_apart(const Attention& op, Linear& projection) const;
    void store(const Attention& op, const State& state, std::size_t row, std::size_t head, float* scratch);
    CacheHead head(const Attention& op, std::size_t sequence, std::size_t head) const;

    const int threads_;
    const bool exact_;
    const CacheType cache_type_;
    std::size_t vocabulary_ = 0, most_ = 0, capacity_ = 0, sequences_ = 0;
    std::vector<Op> program_;
    std::vector<std::vector<float>> frequencies_;
    std::vector<Memory> turns_;  // [M, rotary / 2, 2] cosine and sine, for each of frequencies_
    Rows buffers_[kBuffers];
    std::vector<Worker> workers_;
    std::vector<CacheShape> shapes_;                     // by layer
    std::vector<std::vector<Memory>> caches_;            // [layers][sequences]
    std::unique_ptr<std::atomic<std::size_t>[]> taken_;  // chunks handed out, by operation
    Barrier barrier_;
};

}  // namespace nybble
