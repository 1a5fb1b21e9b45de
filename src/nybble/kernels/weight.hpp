// A weight in the kernel layout that owns its memory, and how it is made from what files store.
#pragma once

#include "kernels.hpp"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace nybble {

// Zeroed memory on a cache line; large pieces come from the system page by page, so that untouched ones cost nothing.
class Memory {
  public:
    Memory() = default;
    // huge: in pages of two megabytes where the system has them, side by side with others, for what is read from end to end
    // again and again. Addresses are free again when all that share a slab are gone; whole pages go back at once.
    explicit Memory(std::size_t bytes, bool huge = false);
    ~Memory();
    Memory(Memory&& other) noexcept;
    Memory& operator=(Memory&& other) noexcept;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    template <class T = std::uint8_t>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    std::size_t bytes() const { return bytes_; }

  private:
    std::uint8_t* data_ = nullptr;
    std::size_t bytes_ = 0;
    bool mapped_ = false;
    std::shared_ptr<void> slab_;  // what the memory is a part of, if it is
};

// Float values as a checkpoint stores them: [rows, columns], or [columns, rows] when transposed (GPT-2's Conv1D).
struct FloatSource {
    const void* values;
    Holds holds;
    std::size_t rows, columns;
    bool transposed;
};

// Scales or shifts as ggml's runs have them: codes [rows, blocks] times outer halves [rows, blocks / per].
struct NestedSource {
    const std::uint8_t* codes;
    const std::uint16_t* outer;
    std::int32_t bias;
    std::size_t per;
};

class LaidWeight {
  public:
    // From packed codes (kernels.hpp's Weight), whose offset is a zero point in codes or a shift in values. drop: the arrays are not read again,
    // and are a mapped file whose pages are given back. Formats whose blocks do not fit units become float32.
    // nested: scale and offset (codes nullptr: none) in the place of the source's; only for blocks that fit units.
    LaidWeight(const Weight& source, bool drop, int threads, const NestedSource* nested = nullptr);
    LaidWeight(const FloatSource& source, bool drop, int threads);

    Tiled tiled;
    std::size_t bytes() const {
        return data_.bytes() + scale_.bytes() + offset_.bytes() + outer_[0].bytes() + outer_[1].bytes() + steps_.bytes();
    }
    // The packed rows and parameters it was made from, to the bit; only for weights of codes, nested parameters left out.
    void restore(std::uint8_t* packed, void* scale, void* offset, int threads) const;
    std::size_t parameter_rows = 0;  // 1 where one scale serves the whole weight

  private:
    Memory data_, scale_, offset_, steps_, outer_[2];
};

// Zeros behind a vector, so that whole registers can be loaded.
std::vector<float> padded(const float* from, std::size_t count, std::size_t to);

}  // namespace nybble
