// Half-precision numbers on the CPU: two bytes of storage, converted to float for arithmetic, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace sstmerge {

struct Float16 {
    std::uint16_t bits;
};
struct Bfloat16 {
    std::uint16_t bits;
};

template <typename To, typename From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(Bfloat16 value) { return bit_cast<float>(std::uint32_t{value.bits} << 16); }
inline float widen(Float16 value) {
    const std::uint32_t sign = std::uint32_t{value.bits} >> 15 << 31, magnitude = (value.bits & 0x7FFFu) << 13;
    // The exponents are biased by 15 and 127: a product with 2^112 moves them, subnormal numbers included.
    const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
    return bit_cast<float>(sign | (magnitude < 0x7C00u << 13 ? finite : magnitude | 0x7F800000u));
}

template <typename Element>
Element round_to(decltype(widen(Element{})) value);
template <>
inline double round_to<double>(double value) {
    return value;
}
template <>
inline float round_to<float>(float value) {
    return value;
}
template <>
inline Bfloat16 round_to<Bfloat16>(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return {static_cast<std::uint16_t>(value == value ? rounded : 0x7FC0u)};
}
template <>
inline Float16 round_to<Float16>(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value), sign = bits >> 16 & 0x8000,
                        magnitude = bits & 0x7FFFFFFF;
    const std::uint32_t normal = (magnitude + 0xFFF + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // The steps of float between 0.5 and 1 are those of subnormal halves: adding 0.5 rounds, its bits then fall away.
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    const std::uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
    const std::uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return {static_cast<std::uint16_t>(sign | (magnitude < 0x477FF000u ? finite : special))};
}

}  // namespace sstmerge
