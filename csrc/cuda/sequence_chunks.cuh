// The unit of work of the score kernels: a chunk of the tokens of one sequence, so that a few long sequences fill the
// device as well as many short ones.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

struct SequenceChunk {
    long long first;  // its first row
    long long rows;   // zero where the sequence has fewer chunks than others
    bool valid;       // whether the sequence's span lies within the tokens
};

// Chunk `unit` % chunks of sequence `unit` / chunks, whose rows are [spans[2 s], spans[2 s + 1]). All chunks of a
// sequence but its last ones have the same number of rows, a multiple of `granule`. A span that lies not within the
// tokens cannot be refused here: its chunks are empty and not valid, and nothing is read.
__device__ __forceinline__ SequenceChunk find_chunk(const long long* spans, long long tokens, int unit, int chunks,
                                                    int granule) {
    const long long start = spans[2 * (unit / chunks)], stop = spans[2 * (unit / chunks) + 1];
    if (start < 0 || stop < start || stop > tokens) return {0, 0, false};
    const long long per_chunk = (stop - start + chunks - 1) / chunks;
    const long long length = (per_chunk + granule - 1) / granule * granule;
    const long long first = start + unit % chunks * length;
    const long long left = stop - first;
    return {first, left < 0 ? 0 : left < length ? left : length, true};
}

// What stands for the sums over a chunk that is not valid.
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7FC00000u); }

}  // namespace sstmerge::device
