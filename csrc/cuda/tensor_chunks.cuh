// Many tensors of different sizes in one launch: they lie one after another in one allocation, every block takes a
// chunk of one of them, and threads move 16 bytes at a time wherever the addresses allow it.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

// Where tensors begin and end, among all entries (tensors + 1) and among all chunks (tensors + 1).
struct TensorTable {
    const long long* offsets;
    const long long* chunk_offsets;
    int tensors;
    int chunk;  // entries per chunk; the last one of a tensor may be shorter
};

// Entries begin <= e < end of a tensor whose entry 0 is the entry `offset` of all.
struct TensorChunk {
    int tensor;
    long long offset, begin, end;
};

__device__ __forceinline__ TensorChunk tensor_chunk_at(const TensorTable& table, long long number) {
    int low = 0, high = table.tensors;  // the tensor is the last whose chunks begin at or before the number
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.chunk_offsets[middle] <= number) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const long long offset = table.offsets[low], size = table.offsets[low + 1] - offset;
    const long long begin = (number - table.chunk_offsets[low]) * table.chunk;
    return {low, offset, begin, begin + table.chunk < size ? begin + table.chunk : size};
}

template <int Count>
struct Width {
    static constexpr int kCount = Count;
};

template <typename Element>
constexpr int kPacket = 16 / sizeof(Element);

template <typename Element, int Count>
struct alignas(Count * sizeof(Element)) Packet {
    Element element[Count];
};

template <int Count, typename Element>
__device__ __forceinline__ Packet<Element, Count> load_packet(const Element* source) {
    return *reinterpret_cast<const Packet<Element, Count>*>(source);
}

template <int Count, typename Element>
__device__ __forceinline__ void store_packet(Element* target, const Packet<Element, Count>& packet) {
    *reinterpret_cast<Packet<Element, Count>*>(target) = packet;
}

// Calls `visit(Width<n>{}, first)` so that the threads of the block visit all entries `first`, ..., `first` + n - 1 of
// begin <= e < end once. n is 1, or kPacket<Element> where `offset + first` is a multiple of that.
template <typename Element, typename Visit>
__device__ __forceinline__ void for_each_packet(const TensorChunk& chunk, bool aligned, Visit visit) {
    constexpr int kCount = kPacket<Element>;
    const long long thread = threadIdx.x, threads = blockDim.x;
    long long first = (chunk.offset + chunk.begin + kCount - 1) / kCount * kCount - chunk.offset;
    long long last = (chunk.offset + chunk.end) / kCount * kCount - chunk.offset;
    if (!aligned || first >= last) first = last = chunk.end;
    for (long long e = chunk.begin + thread; e < first; e += threads) visit(Width<1>{}, e);
    for (long long e = first + thread * kCount; e < last; e += threads * kCount) visit(Width<kCount>{}, e);
    for (long long e = last + thread; e < chunk.end; e += threads) visit(Width<1>{}, e);
}

}  // namespace sstmerge::device
