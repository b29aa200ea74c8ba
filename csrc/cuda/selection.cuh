// Which entries of many tensors have the largest magnitudes: radix selection, digit by digit from the top. Of each
// digit one launch counts the candidates, by chunks, and one picks the digit of the smallest magnitude that is kept.
#pragma once

#include "tensor_chunks.cuh"

namespace sstmerge::device {

constexpr int kDigits = 2048;
constexpr int kSelectionThreads = 256;
constexpr int kDigitsPerThread = kDigits / kSelectionThreads;

// Without the sign bit, a number's bits are ordered like its magnitude; NaN is the largest.
template <typename Bits>
__device__ __forceinline__ Bits magnitude(Bits bits) {
    return bits & static_cast<Bits>(~(1ull << (8 * sizeof(Bits) - 1)));
}

// counts (chunks, kDigits): how often each value of `magnitude >> shift`, `width` bits of it, occurs in a chunk among
// the entries whose higher bits are the tensor's prefix. Shared memory: kDigits counters, whose sums do not depend on
// the order of the atomic additions. One block per chunk.
template <typename Bits>
__device__ __forceinline__ void count_digits(const Bits* __restrict__ values, const TensorTable& table,
                                             const unsigned long long* __restrict__ prefixes, int shift, int width,
                                             unsigned* __restrict__ counts) {
    SSTMERGE_SHARED_MEMORY(shared);
    unsigned* histogram = reinterpret_cast<unsigned*>(shared);
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) histogram[digit] = 0;
    __syncthreads();
    const TensorChunk chunk = tensor_chunk_at(table, blockIdx.x);
    const unsigned long long prefix = prefixes[chunk.tensor];
    const unsigned mask = (1u << width) - 1;
    for_each_packet<Bits>(chunk, true, [&](auto count, long long first) {
        constexpr int kCount = decltype(count)::kCount;
        const Packet<Bits, kCount> packet = load_packet<kCount>(values + chunk.offset + first);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const unsigned long long bits = magnitude(packet.element[i]);
            if (bits >> (shift + width) == prefix) {
                atomicAdd(&histogram[static_cast<unsigned>(bits >> shift) & mask], 1u);
            }
        }
    });
    __syncthreads();
    counts += static_cast<long long>(blockIdx.x) * kDigits;
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) counts[digit] = histogram[digit];
}

// The first thread at which the running sum of the threads' numbers reaches `rank` (>= 1), the number of threads where
// it never does; what came before is taken from `rank`. All threads get both. Shared memory: a sum per thread.
__device__ __forceinline__ int find_rank(unsigned long long own, unsigned long long& rank, unsigned long long* sums) {
    const int thread = threadIdx.x, threads = blockDim.x;
    __syncthreads();  // the sums of a search before may still be read
    sums[thread] = own;
    __syncthreads();
    for (int distance = 1; distance < threads; distance *= 2) {
        const unsigned long long before = thread >= distance ? sums[thread - distance] : 0;
        __syncthreads();
        sums[thread] += before;
        __syncthreads();
    }
    int low = 0, high = threads;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sums[middle] >= rank) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if (low > 0) rank -= sums[low - 1];
    return low;
}

// Appends to the tensor's prefix the digit of the entry that is the remaining[tensor]-th largest of the candidates, and
// takes the larger candidates from the rank. A rank of 0 ends in the largest magnitude. One block of kSelectionThreads
// per tensor; shared memory: a sum of 8 bytes per thread.
__device__ __forceinline__ void pick_digit(const unsigned* __restrict__ counts, const TensorTable& table, int width,
                                           unsigned long long* __restrict__ prefixes,
                                           unsigned long long* __restrict__ remaining) {
    SSTMERGE_SHARED_MEMORY(shared);
    const int tensor = blockIdx.x;
    unsigned long long rank = remaining[tensor];
    const unsigned long long prefix = prefixes[tensor] << width;
    if (rank == 0) {
        if (threadIdx.x == 0) prefixes[tensor] = prefix | ((1ull << width) - 1);
        return;
    }
    // Thread t has the t-th group of digits from the top.
    const int lowest = kDigits - (static_cast<int>(threadIdx.x) + 1) * kDigitsPerThread;
    unsigned long long own[kDigitsPerThread] = {}, sum = 0;
#pragma unroll 4
    for (long long chunk = table.chunk_offsets[tensor]; chunk < table.chunk_offsets[tensor + 1]; ++chunk) {
        const auto low = load_packet<4>(counts + chunk * kDigits + lowest);
        const auto high = load_packet<4>(counts + chunk * kDigits + lowest + 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            own[i] += low.element[i];
            own[i + 4] += high.element[i];
        }
    }
#pragma unroll
    for (int i = 0; i < kDigitsPerThread; ++i) sum += own[i];
    if (find_rank(sum, rank, reinterpret_cast<unsigned long long*>(shared)) != static_cast<int>(threadIdx.x)) return;
    bool found = false;
#pragma unroll
    for (int i = kDigitsPerThread - 1; i >= 0; --i) {
        if (found) continue;
        found = own[i] >= rank;
        if (found) {
            prefixes[tensor] = prefix | static_cast<unsigned>(lowest + i);
            remaining[tensor] = rank;
        } else {
            rank -= own[i];
        }
    }
}

// last_equal (tensors): index of the remaining[tensor]-th entry whose magnitude is the tensor's threshold, -1 for the
// 0th. `counts` are those of the last digit, which is `width` bits wide. One block of kSelectionThreads per tensor;
// shared memory: a sum of 8 bytes per thread.
template <typename Bits>
__device__ __forceinline__ void find_last_equal(const Bits* __restrict__ values, const TensorTable& table,
                                                const unsigned* __restrict__ counts, int width,
                                                const unsigned long long* __restrict__ thresholds,
                                                const unsigned long long* __restrict__ remaining,
                                                long long* __restrict__ last_equal) {
    SSTMERGE_SHARED_MEMORY(shared);
    unsigned long long* sums = reinterpret_cast<unsigned long long*>(shared);
    const int tensor = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
    unsigned long long rank = remaining[tensor];
    if (rank == 0) {
        if (thread == 0) last_equal[tensor] = -1;
        return;
    }
    const unsigned long long threshold = thresholds[tensor];
    counts += threshold & ((1ull << width) - 1);
    // Its chunk, then the thread whose share of the chunk holds it, then the entry.
    const long long chunks_end = table.chunk_offsets[tensor + 1];
    long long number = table.chunk_offsets[tensor];
    for (; number < chunks_end; number += threads) {
        const unsigned long long own = number + thread < chunks_end ? counts[(number + thread) * kDigits] : 0;
        const int found = find_rank(own, rank, sums);
        if (found == threads) continue;
        number += found;
        break;
    }
    const TensorChunk chunk = tensor_chunk_at(table, number);
    const long long share = (chunk.end - chunk.begin + threads - 1) / threads;
    const long long begin = chunk.begin + thread * share;
    const long long end = begin + share < chunk.end ? begin + share : chunk.end;
    unsigned long long own = 0;
    for (long long e = begin; e < end; ++e) own += magnitude(values[chunk.offset + e]) == threshold;
    if (find_rank(own, rank, sums) != thread) return;
    for (long long e = begin; e < end; ++e) {
        if (magnitude(values[chunk.offset + e]) == threshold && --rank == 0) last_equal[tensor] = e;
    }
}

// Whether an entry is among the largest.
template <typename Bits>
__device__ __forceinline__ bool is_kept(Bits bits, long long entry, Bits threshold, long long last) {
    const Bits size = magnitude(bits);
    return size > threshold || (size == threshold && entry <= last);
}

}  // namespace sstmerge::device
