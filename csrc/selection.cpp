#include "selection.h"

#include <algorithm>
#include <array>
#include <vector>

namespace sstmerge {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Entries that are counted into 32-bit counters before these are emptied.
constexpr std::int64_t kBlock = 1 << 18;

using Histogram = std::array<std::int64_t, kDigits>;

// Counts the digits `magnitude >> shift` of those entries whose higher digits are `prefix`.
template <typename Bits>
void count_block(const Bits* values, std::int64_t size, int shift, int width, Bits prefix, Histogram& total) {
    // Neighbours are often equal: one counter per lane spares the wait for the one before.
    constexpr int kLanes = 4;
    std::uint32_t counts[kLanes][kDigits] = {};
    const Bits mask = static_cast<Bits>((1 << width) - 1);
    const bool all = shift + width >= static_cast<int>(8 * sizeof(Bits)) - 1;
    const auto count = [&](std::int64_t i, int lane) {
        const Bits magnitude = values[i] & kMagnitude<Bits>;
        if (all || magnitude >> (shift + width) == prefix) ++counts[lane][magnitude >> shift & mask];
    };
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) count(i + lane, lane);
    }
    for (; i < size; ++i) count(i, 0);
    for (int digit = 0; digit < 1 << width; ++digit) {
        for (int lane = 0; lane < kLanes; ++lane) total[digit] += counts[lane][digit];
    }
}

template <typename Bits>
Histogram count_digits(const Bits* values, std::int64_t size, int shift, int width, Bits prefix, int num_threads) {
    Histogram total = {};
    const std::int64_t blocks = (size + kBlock - 1) / kBlock;
    const auto count = [&](std::int64_t block, Histogram& histogram) {
        const std::int64_t begin = block * kBlock;
        count_block(values + begin, std::min(kBlock, size - begin), shift, width, prefix, histogram);
    };
    const int threads = static_cast<int>(std::min<std::int64_t>(num_threads, blocks));
    if (threads <= 1) {
        for (std::int64_t block = 0; block < blocks; ++block) count(block, total);
        return total;
    }
    // One histogram per thread; they are integers, so that their sum does not depend on who counted what.
    std::vector<Histogram> histograms(threads, total);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        for (std::int64_t block = thread; block < blocks; block += threads) count(block, histograms[thread]);
    }
    for (const Histogram& histogram : histograms) {
        for (int digit = 0; digit < kDigits; ++digit) total[digit] += histogram[digit];
    }
    return total;
}

// The index of the entry of this magnitude that has `before` others of it before it.
template <typename Bits>
std::int64_t find_equal(const Bits* values, std::int64_t size, Bits magnitude, std::int64_t before) {
    constexpr std::int64_t kStep = 4096;
    for (std::int64_t begin = 0; begin < size; begin += kStep) {
        const std::int64_t end = std::min(begin + kStep, size);
        Bits equal = 0;  // kStep fits into the smallest type
        for (std::int64_t i = begin; i < end; ++i) equal += (values[i] & kMagnitude<Bits>) == magnitude;
        if (equal <= before) {
            before -= equal;
            continue;
        }
        for (std::int64_t i = begin; i < end; ++i) {
            if ((values[i] & kMagnitude<Bits>) == magnitude && before-- == 0) return i;
        }
    }
    return size - 1;
}

}  // namespace

template <typename Bits>
Selection<Bits> select_largest(const Bits* values, std::int64_t size, std::int64_t kept, int num_threads) {
    if (kept == 0) return {kMagnitude<Bits>, -1};  // no magnitude is above the largest
    if (kept == size) return {0, size - 1};
    std::int64_t remaining = kept, equal = 0;
    Bits prefix = 0;
    for (int shift = 8 * sizeof(Bits) - 1; shift > 0;) {
        const int width = std::min(kDigitBits, shift);
        shift -= width;
        const Histogram histogram = count_digits(values, size, shift, width, prefix, num_threads);
        int digit = (1 << width) - 1;
        for (; digit > 0 && histogram[digit] < remaining; --digit) remaining -= histogram[digit];
        prefix = static_cast<Bits>(prefix << width | digit);
        equal = histogram[digit];
    }
    return {prefix, remaining == equal ? size - 1 : find_equal(values, size, prefix, remaining - 1)};
}

template Selection<std::int16_t> select_largest(const std::int16_t*, std::int64_t, std::int64_t, int);
template Selection<std::int32_t> select_largest(const std::int32_t*, std::int64_t, std::int64_t, int);
template Selection<std::int64_t> select_largest(const std::int64_t*, std::int64_t, std::int64_t, int);

}  // namespace sstmerge
