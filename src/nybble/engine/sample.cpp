// Chooses a token in time that grows with the vocabulary, not with its sorting: see sample.hpp.
#include "sample.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

namespace nybble {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Candidate {
    double value;     // logit, then weight relative to the likeliest token's
    std::uint32_t id;  // a vocabulary has fewer than 2^32 tokens
};

// Of equal values the lower id ranks higher: the order in which top-k and top-p keep tokens.
bool ranks_before(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Kept between calls: half a megabyte a token would otherwise be mapped and cleared anew.
struct Scratch {
    std::vector<double> logits;
    std::vector<Candidate> candidates, bucket;
};

// Copies the logits, checks them, and applies the penalty to each token that was seen, once.
void penalize(const float* logits, std::size_t count, const std::int64_t* history, std::size_t history_count, double penalty,
              std::vector<double>& out) {
    out.resize(count);
    bool bad = false, any = false;
    for (std::size_t i = 0; i < count; ++i) {
        const float value = logits[i];
        bad |= !(value < std::numeric_limits<float>::infinity());  // NaN too
        any |= value > -std::numeric_limits<float>::infinity();
        out[i] = value;
    }
    if (bad) throw std::domain_error("a logit is NaN or +infinity");
    if (!any) throw std::domain_error("all logits are -infinity");
    if (penalty == 1.0) return;
    for (std::size_t i = 0; i < history_count; ++i) {
        const std::size_t id = static_cast<std::size_t>(history[i]);
        const double value = logits[id];  // from the source, so that a token seen twice is penalized once
        out[id] = value > 0.0 ? value / penalty : value * penalty;
    }
}

// The k highest-ranked of the values, by id. Gathers those above a threshold that rises with what was gathered: after the
// first few hundred tokens nearly none is.
void take_top(const std::vector<double>& values, std::size_t k, std::vector<Candidate>& out) {
    out.clear();
    double threshold = -kInfinity;
    const auto cut = [&] {
        std::nth_element(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(k) - 1, out.end(), ranks_before);
        out.resize(k);
        threshold = out[k - 1].value;  // a later token of the same value has a higher id, so it ranks below
    };
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (!(values[i] > threshold)) continue;
        out.push_back({values[i], static_cast<std::uint32_t>(i)});
        if (out.size() == 2 * k) cut();
    }
    if (out.size() > k) cut();
    std::sort(out.begin(), out.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
}

// Weights in (0, 1] in buckets an eighth of a power of two wide, the heavy ones first; what is below 2^-64 in the last one.
constexpr std::size_t kBuckets = 64 * 8;
std::size_t bucket_of(double weight) {
    constexpr std::uint64_t one = std::bit_cast<std::uint64_t>(1.0) >> 49;  // exponent and 3 bits after the point
    return std::min<std::size_t>(kBuckets - 1, one - (std::bit_cast<std::uint64_t>(weight) >> 49));
}

// Keeps the fewest highest-ranked candidates whose weights reach `share` of the total. Only the bucket in which they reach
// it is sorted.
void keep_share(std::vector<Candidate>& candidates, double share, double total, std::vector<Candidate>& scratch) {
    double weight[kBuckets] = {};
    for (const Candidate& c : candidates) weight[bucket_of(c.value)] += c.value;
    double sum = 0.0;
    std::size_t last = 0;
    while (last < kBuckets - 1 && sum + weight[last] < share * total) sum += weight[last++];

    scratch.clear();
    for (const Candidate& c : candidates)
        if (bucket_of(c.value) == last) scratch.push_back(c);
    std::sort(scratch.begin(), scratch.end(), ranks_before);
    std::size_t kept = 0;
    while (kept < scratch.size() && (sum += scratch[kept++].value) < share * total) {}
    if (kept == 0) return;  // rounding left the last bucket to reach it: all stay
    const Candidate lowest = scratch[kept - 1];
    std::erase_if(candidates, [&](const Candidate& c) { return ranks_before(lowest, c); });
}

double total_of(const std::vector<Candidate>& candidates) {
    double total = 0.0;
    for (const Candidate& c : candidates) total += c.value;
    return total;
}

}  // namespace

std::int64_t choose(const float* logits, std::size_t count, const std::int64_t* history, std::size_t history_count,
                    const Sampling& sampling, double u) {
    thread_local Scratch scratch;
    std::vector<double>& values = scratch.logits;
    penalize(logits, count, history, history_count, sampling.repetition_penalty, values);
    const auto largest = std::max_element(values.begin(), values.end());  // the first of equal ones
    if (sampling.temperature == 0.0 || sampling.top_k == 1) return largest - values.begin();

    std::vector<Candidate>& kept = scratch.candidates;  // always in order of ids
    const double top = *largest;
    if (sampling.top_k != 0 && sampling.top_k < count) {
        take_top(values, sampling.top_k, kept);
    } else {
        kept.resize(count);
        for (std::size_t i = 0; i < count; ++i) kept[i] = {values[i], static_cast<std::uint32_t>(i)};
    }
    for (Candidate& c : kept) c.value = std::exp((c.value - top) / sampling.temperature);  // the largest is 1
    if (sampling.top_p < 1.0) keep_share(kept, sampling.top_p, total_of(kept), scratch.bucket);
    if (sampling.min_p > 0.0) std::erase_if(kept, [&](const Candidate& c) { return c.value < sampling.min_p; });

    const double target = u * total_of(kept);
    double cumulative = 0.0;
    for (const Candidate& c : kept) {
        cumulative += c.value;
        if (cumulative > target) return c.id;
    }
    return kept.back().id;
}

}  // namespace nybble
