// Magnitude pruning, DARE and TIES on many tensors of different sizes.
#pragma once

#include "primitives.cuh"
#include "random.cuh"
#include "selection.cuh"
#include "tensor_chunks.cuh"

namespace sstmerge::device {

// The type that sums and products of a type of numbers are computed in, and the way there and back.
template <typename Element>
struct Arithmetic {
    using Real = float;
    using Bits = unsigned short;
    static __device__ __forceinline__ Real widen(Bits bits) { return to_float(Element{bits}); }
    static __device__ __forceinline__ Element round(Real value) { return round_to<Element>(value); }
};
template <>
struct Arithmetic<float> {
    using Real = float;
    using Bits = unsigned;
    static __device__ __forceinline__ Real widen(Bits bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ float round(Real value) { return value; }
};
template <>
struct Arithmetic<double> {
    using Real = double;
    using Bits = unsigned long long;
    static __device__ __forceinline__ Real widen(Bits bits) {
        return __longlong_as_double(static_cast<long long>(bits));
    }
    static __device__ __forceinline__ double round(Real value) { return value; }
};

// Products that the compiler does not fuse with a sum, so that the bits are those of the CPU.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

template <typename Bits>
__device__ __forceinline__ void magnitude_prune(const Bits* __restrict__ values, Bits* __restrict__ outputs,
                                                const TensorTable& table,
                                                const unsigned long long* __restrict__ thresholds,
                                                const long long* __restrict__ last_equal) {
    const TensorChunk chunk = tensor_chunk_at(table, blockIdx.x);
    const Bits threshold = static_cast<Bits>(thresholds[chunk.tensor]);
    const long long last = last_equal[chunk.tensor];
    for_each_packet<Bits>(chunk, true, [&](auto count, long long first) {
        constexpr int kCount = decltype(count)::kCount;
        Packet<Bits, kCount> packet = load_packet<kCount>(values + chunk.offset + first);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (!is_kept(packet.element[i], first + i, threshold, last)) packet.element[i] = 0;
        }
        store_packet<kCount>(outputs + chunk.offset + first, packet);
    });
}

// An entry is kept where its random word is below `keep_below`; entry e of a tensor has word e % 4 of the tensor's
// block e / 4.
template <typename Element>
__device__ __forceinline__ void dare(const typename Arithmetic<Element>::Bits* __restrict__ values,
                                     Element* __restrict__ outputs, const TensorTable& table, unsigned long long seed,
                                     unsigned long long first_stream, unsigned long long keep_below,
                                     typename Arithmetic<Element>::Real scale) {
    const TensorChunk chunk = tensor_chunk_at(table, blockIdx.x);
    const unsigned long long stream = first_stream + chunk.tensor;
    for_each_packet<Element>(chunk, true, [&](auto count, long long first) {
        constexpr int kCount = decltype(count)::kCount;
        const auto packet = load_packet<kCount>(values + chunk.offset + first);
        Packet<Element, kCount> kept;
        RandomBlock random = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int place = static_cast<int>((first + i) & 3);
            if (i == 0 || place == 0) random = random_words(seed, stream, (first + i) >> 2);
            const unsigned early = place == 0 ? random.word[0] : random.word[1];
            const unsigned late = place == 2 ? random.word[2] : random.word[3];
            const auto scaled = product(Arithmetic<Element>::widen(packet.element[i]), scale);
            kept.element[i] = Arithmetic<Element>::round((place < 2 ? early : late) < keep_below ? scaled : 0);
        }
        store_packet<kCount>(outputs + chunk.offset + first, kept);
    });
}

// What the tasks say about one entry. Sums and numbers of either sign are kept until the sign is known, so that every
// task is read once.
template <typename Real>
struct Votes {
    Real total = 0, positive = 0, negative = 0;
    int positives = 0, negatives = 0;

    __device__ __forceinline__ void add(Real value, Real weight) {
        const Real weighted = product(weight, value);
        total += value;
        positive += value <= 0 ? Real(0) : weighted;  // NaN counts for both
        negative += value >= 0 ? Real(0) : weighted;
        positives += value > 0;
        negatives += value < 0;
    }

    __device__ __forceinline__ Real merged(bool by_frequency) const {
        const bool is_positive = by_frequency ? positives >= negatives : total >= 0;
        const int number = is_positive ? positives : negatives;
        return (is_positive ? positive : negative) / static_cast<Real>(number > 1 ? number : 1);
    }
};

// values: the tensors of the first task as the table has them, and `task_stride` entries later those of the second, and
// so on; thresholds and last_equal (tasks, tensors), weights (tasks).
template <typename Element>
__device__ __forceinline__ void ties(const typename Arithmetic<Element>::Bits* __restrict__ values,
                                     Element* __restrict__ outputs, const TensorTable& table,
                                     const unsigned long long* __restrict__ thresholds,
                                     const long long* __restrict__ last_equal,
                                     const typename Arithmetic<Element>::Real* __restrict__ weights, int tasks,
                                     long long task_stride, bool by_frequency) {
    using Real = typename Arithmetic<Element>::Real;
    const TensorChunk chunk = tensor_chunk_at(table, blockIdx.x);
    const bool aligned = task_stride % kPacket<Element> == 0;
    for_each_packet<Element>(chunk, aligned, [&](auto count, long long first) {
        constexpr int kCount = decltype(count)::kCount;
        Votes<Real> votes[kCount];
        for (int task = 0; task < tasks; ++task) {
            const long long row = static_cast<long long>(task) * table.tensors + chunk.tensor;
            const auto threshold = static_cast<typename Arithmetic<Element>::Bits>(thresholds[row]);
            const long long last = last_equal[row];
            const Real weight = weights[task];
            const auto packet = load_packet<kCount>(values + task * task_stride + chunk.offset + first);
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const bool kept = is_kept(packet.element[i], first + i, threshold, last);
                votes[i].add(kept ? Arithmetic<Element>::widen(packet.element[i]) : Real(0), weight);
            }
        }
        Packet<Element, kCount> merged;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            merged.element[i] = Arithmetic<Element>::round(votes[i].merged(by_frequency));
        }
        store_packet<kCount>(outputs + chunk.offset + first, merged);
    });
}

}  // namespace sstmerge::device

#define SSTMERGE_TABLE_PARAMETERS const long long *offsets, const long long *chunk_offsets, int tensors, int chunk
#define SSTMERGE_TABLE {offsets, chunk_offsets, tensors, chunk}

// Kernels that look at bits only: 16 (float16, bfloat16), 32 and 64 of them.
#define SSTMERGE_DEFINE_FOR_BITS(bits, Bits)                                                                   \
    extern "C" __global__ void __launch_bounds__(512)                                                          \
        count_digits_##bits(const Bits* values, SSTMERGE_TABLE_PARAMETERS, const unsigned long long* prefixes, \
                            int shift, int width, unsigned* counts) {                                          \
        sstmerge::device::count_digits<Bits>(values, SSTMERGE_TABLE, prefixes, shift, width, counts);          \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) find_last_equal_##bits(                                  \
        const Bits* values, SSTMERGE_TABLE_PARAMETERS, const unsigned* counts, int width,                      \
        const unsigned long long* thresholds, const unsigned long long* remaining, long long* last_equal) {    \
        sstmerge::device::find_last_equal<Bits>(values, SSTMERGE_TABLE, counts, width, thresholds, remaining,  \
                                                last_equal);                                                   \
    }                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                          \
        magnitude_prune_##bits(const Bits* values, Bits* outputs, SSTMERGE_TABLE_PARAMETERS,                   \
                               const unsigned long long* thresholds, const long long* last_equal) {            \
        sstmerge::device::magnitude_prune<Bits>(values, outputs, SSTMERGE_TABLE, thresholds, last_equal);      \
    }

SSTMERGE_DEFINE_FOR_BITS(16, unsigned short)
SSTMERGE_DEFINE_FOR_BITS(32, unsigned)
SSTMERGE_DEFINE_FOR_BITS(64, unsigned long long)

extern "C" __global__ void __launch_bounds__(256)
    pick_digit(const unsigned* counts, SSTMERGE_TABLE_PARAMETERS, int width, unsigned long long* prefixes,
               unsigned long long* remaining) {
    sstmerge::device::pick_digit(counts, SSTMERGE_TABLE, width, prefixes, remaining);
}

#define SSTMERGE_DEFINE_FOR_NUMBERS(name, Element)                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                             \
        dare_##name(const sstmerge::device::Arithmetic<Element>::Bits* values, Element* outputs,                  \
                    SSTMERGE_TABLE_PARAMETERS, unsigned long long seed, unsigned long long first_stream,          \
                    unsigned long long keep_below, sstmerge::device::Arithmetic<Element>::Real scale) {           \
        sstmerge::device::dare<Element>(values, outputs, SSTMERGE_TABLE, seed, first_stream, keep_below, scale);  \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                             \
        ties_##name(const sstmerge::device::Arithmetic<Element>::Bits* values, Element* outputs,                  \
                    SSTMERGE_TABLE_PARAMETERS, const unsigned long long* thresholds, const long long* last_equal, \
                    const sstmerge::device::Arithmetic<Element>::Real* weights, int tasks, long long task_stride, \
                    int by_frequency) {                                                                           \
        sstmerge::device::ties<Element>(values, outputs, SSTMERGE_TABLE, thresholds, last_equal, weights, tasks,  \
                                        task_stride, by_frequency != 0);                                          \
    }

SSTMERGE_DEFINE_FOR_NUMBERS(float16, sstmerge::device::Float16)
SSTMERGE_DEFINE_FOR_NUMBERS(bfloat16, sstmerge::device::Bfloat16)
SSTMERGE_DEFINE_FOR_NUMBERS(float32, float)
SSTMERGE_DEFINE_FOR_NUMBERS(float64, double)

#undef SSTMERGE_TABLE_PARAMETERS
#undef SSTMERGE_TABLE
#undef SSTMERGE_DEFINE_FOR_BITS
#undef SSTMERGE_DEFINE_FOR_NUMBERS

#define SSTMERGE_SPARSIFY_KERNELS(entry)                                                                               \
    entry(pick_digit) entry(count_digits_16) entry(count_digits_32) entry(count_digits_64) entry(find_last_equal_16)   \
        entry(find_last_equal_32) entry(find_last_equal_64) entry(magnitude_prune_16) entry(magnitude_prune_32)        \
            entry(magnitude_prune_64) entry(dare_float16) entry(dare_bfloat16) entry(dare_float32) entry(dare_float64) \
                entry(ties_float16) entry(ties_bfloat16) entry(ties_float32) entry(ties_float64)
