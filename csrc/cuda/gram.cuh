// Products A^T B of tall float matrices, one 64 x 64 tile per block: scores and Grams of projected tokens, over the
// chunks of sequences, and rotations of scores. Any numbers of columns; the sums run in float, in the order of the
// rows.
#pragma once

#include "sequence_chunks.cuh"

namespace sstmerge::device {

constexpr int kGramTile = 64, kGramRows = 32, kGramThreads = 256;
// A thread owns 4 x 4 elements of the tile: 16 x 16 threads.
constexpr int kGramEdge = 4;

struct alignas(16) Quad {
    float value[kGramEdge];
};

// A row-major matrix, `stride` elements from row to row.
struct TallMatrix {
    const float* first;
    long long stride;
    int columns;
};

// target (kGramRows x kGramTile) = the columns from `column` on of `count` rows from `row` on, zero beyond the edges.
__device__ __forceinline__ void load_columns(float* target, const TallMatrix& matrix, long long row, long long count,
                                             int column) {
    constexpr int kRowsPerStep = kGramThreads / kGramTile;
    const int i = threadIdx.x / kGramTile, j = threadIdx.x % kGramTile;
    const bool inside = column + j < matrix.columns;
    const float* source = matrix.first + (row + i) * matrix.stride + column + j;
#pragma unroll
    for (int step = 0; step < kGramRows; step += kRowsPerStep) {
        target[(step + i) * kGramTile + j] = inside && step + i < count ? *source : 0.0f;
        source += kRowsPerStep * matrix.stride;
    }
}

// Tile `tile` (counted along the rows of tiles) of out = left^T right, contiguous, summed over `rows` rows; NaN where
// the rows are not valid. Shared memory: 2 * kGramRows * kGramTile floats.
__device__ __forceinline__ void multiply_transposed(const TallMatrix& left, const TallMatrix& right, long long rows,
                                                    bool valid, int tile, float* __restrict__ out) {
    SSTMERGE_SHARED_MEMORY(shared);
    float* left_tile = reinterpret_cast<float*>(shared);
    float* right_tile = left_tile + kGramRows * kGramTile;
    const int tiles = (right.columns + kGramTile - 1) / kGramTile;
    const int i0 = tile / tiles * kGramTile, j0 = tile % tiles * kGramTile;
    const int i = threadIdx.x / 16 * kGramEdge, j = threadIdx.x % 16 * kGramEdge;
    float sums[kGramEdge][kGramEdge] = {};
    for (long long first = 0; first < rows; first += kGramRows) {
        load_columns(left_tile, left, first, rows - first, i0);
        load_columns(right_tile, right, first, rows - first, j0);
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < kGramRows; ++k) {
            const Quad a = *reinterpret_cast<const Quad*>(left_tile + k * kGramTile + i);
            const Quad b = *reinterpret_cast<const Quad*>(right_tile + k * kGramTile + j);
#pragma unroll
            for (int y = 0; y < kGramEdge; ++y) {
#pragma unroll
                for (int x = 0; x < kGramEdge; ++x) sums[y][x] += a.value[y] * b.value[x];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int y = 0; y < kGramEdge; ++y) {
#pragma unroll
        for (int x = 0; x < kGramEdge; ++x) {
            const int row = i0 + i + y, column = j0 + j + x;
            if (row < left.columns && column < right.columns) {
                out[static_cast<long long>(row) * right.columns + column] = valid ? sums[y][x] : not_a_number();
            }
        }
    }
}

}  // namespace sstmerge::device

// partials[unit] (left_columns x right_columns) = sum over the chunk's tokens t of left_t right_t^T, for the chunks of
// sequences with the spans (sequences, 2). Grid: (sequences * chunks, tiles).
extern "C" __global__ void __launch_bounds__(sstmerge::device::kGramThreads, 3)
    span_products(const float* left, long long left_stride, int left_columns, const float* right,
                  long long right_stride, int right_columns, const long long* spans, long long tokens, int chunks,
                  float* partials) {
    using namespace sstmerge::device;
    const SequenceChunk chunk = find_chunk(spans, tokens, blockIdx.x, chunks, kGramRows);
    multiply_transposed({left + chunk.first * left_stride, left_stride, left_columns},
                        {right + chunk.first * right_stride, right_stride, right_columns}, chunk.rows, chunk.valid,
                        blockIdx.y, partials + static_cast<long long>(blockIdx.x) * left_columns * right_columns);
}

// out[b] (left_columns x right_columns) = left[b]^T right[b], contiguous matrices of `rows` rows; a step of 0 from one
// matrix to the next shares it. Grid: (batch, tiles).
extern "C" __global__ void __launch_bounds__(sstmerge::device::kGramThreads, 3)
    batch_products(const float* left, long long left_step, int left_columns, const float* right, long long right_step,
                   int right_columns, int rows, float* out) {
    using namespace sstmerge::device;
    const long long b = blockIdx.x;
    multiply_transposed({left + b * left_step, left_columns, left_columns},
                        {right + b * right_step, right_columns, right_columns}, rows, true, blockIdx.y,
                        out + b * left_columns * right_columns);
}

#define SSTMERGE_GRAM_KERNELS(entry) entry(span_products) entry(batch_products)
