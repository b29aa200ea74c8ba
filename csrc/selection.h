// Which entries of a tensor have the largest magnitudes: selection by digits instead of sorting.
#pragma once

#include <cstdint>

namespace sstmerge {

// Signed integers of a number's width: without the sign bit, a number's bits are ordered like its magnitude.
template <int Bytes>
struct BitsOfWidth;
template <>
struct BitsOfWidth<2> {
    using Type = std::int16_t;
};
template <>
struct BitsOfWidth<4> {
    using Type = std::int32_t;
};
template <>
struct BitsOfWidth<8> {
    using Type = std::int64_t;
};

// All bits but the sign.
template <typename Bits>
constexpr Bits kMagnitude = static_cast<Bits>(~(std::uint64_t{1} << (8 * sizeof(Bits) - 1)));

// Kept are the magnitudes above `threshold`, and those equal to it at an index up to `last_equal`.
template <typename Bits>
struct Selection {
    Bits threshold;
    std::int64_t last_equal;

    // The magnitudes above this are kept, before `last_equal` + 1 and from there on.
    Bits limit_before() const { return static_cast<Bits>(threshold - 1); }
    Bits limit_after() const { return threshold; }
};

// Selects `kept` of `size` entries, 0 <= kept <= size.
template <typename Bits>
Selection<Bits> select_largest(const Bits* values, std::int64_t size, std::int64_t kept, int num_threads);

}  // namespace sstmerge
