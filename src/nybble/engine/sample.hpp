// The next token from logits. Source: our own; sampling.py is the specification, with the reasons for the order of steps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

struct Sampling {
    double temperature;         // 0: the largest logit
    std::size_t top_k;          // 0: all tokens
    double top_p;               // (0, 1]
    double min_p;               // [0, 1]
    double repetition_penalty;  // above 0; 1: none
};

// The id of the next token, for logits [count], ids seen so far [history_count], each below count, and u in [0, 1).
// Throws std::domain_error when a logit is NaN or +infinity, or all are -infinity. Keeps scratch for each calling thread.
std::int64_t choose(const float* logits, std::size_t count, const std::int64_t* history, std::size_t history_count,
                    const Sampling& sampling, double u);

}  // namespace nybble
