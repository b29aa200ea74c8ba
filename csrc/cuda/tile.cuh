// Tile products for kernels that stream tall matrices once: Y (rows x columns) = X (rows x depth) V (depth x columns)
// with the sums in registers, and Grams P^T Q of such tiles.
//
// The parts, in the order in which a kernel uses them, each called by all threads of the block:
//
//   MatrixTile<Element, rows, columns, stages, warp_rows, warp_columns>
//       The shape: `kThreads` threads; `kPipelineBytes` of shared memory for the product; `kPlanesBytes` for a tile
//       of Y as planes; types `Sums` and `GramSums` for arrays of accumulators in registers. Element is Bfloat16 or
//       Float16. Columns are a multiple of 16 times warp_columns, rows of 16 times warp_rows.
//   RowsOf<Element>, BasisOf<Element>
//       X: `count` rows (1 to kRows; the rest of the tile becomes zero), `depth` columns, `stride` elements from row to
//       row; `aligned`: its address and stride are multiples of 16 bytes, which decides how it is copied.
//       V: `depth` rows of `stride` elements, address and stride multiples of 16 bytes; kColumns columns are read.
//   project_tile<Shape>(sums, pipeline, rows, basis)
//       sums = X V. The pipeline's memory is free to be overwritten when it is called (barrier) and when it returns.
//   store_sums<Shape>(target, stride, sums, count)
//       The first `count` rows of Y as float into global memory; stride even and target a multiple of 8 bytes.
//   store_planes<Shape>(planes, sums, weights, count)
//       Y in shared memory as two planes of Bfloat16, high + low, which together keep 16 bits of every number whatever
//       Element is. Row i is multiplied by sqrt(weights[i]), and is zero where the weight is zero, whatever it holds;
//       weights == nullptr: no weights. Needs a barrier before the planes are read.
//   clear_gram<Shape>(gram), accumulate_gram<Shape>(gram, P, Q)
//       gram (columns x columns) += P^T Q of two pairs of planes, as high*low + low*high + high*high: ~4e-6 of exact.
//       Needs a barrier before the planes are overwritten.
//   store_gram<Shape>(target, stride, gram)
//       Into global or shared memory, row-major.
//
// Rows are padded in shared memory to an odd multiple of 16 bytes, so that neither copies nor matrix loads have bank
// conflicts.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

// Eight bytes or sixteen that move as one.
struct alignas(8) FloatPair {
    float first, second;
};
template <typename Element>
struct alignas(16) Chunk {
    static constexpr int kElements = 16 / sizeof(Element);
    Element elements[kElements];
};

template <typename Element>
struct RowsOf {
    const Element* first;
    long long stride;
    int count, depth;
    bool aligned;
};

template <typename Element>
struct BasisOf {
    const Element* first;
    long long stride;
};

// Shared memory of a product whose operands come in stages of `depth` columns of X and rows of V.
template <typename Element_, int rows, int columns, int depth, int stages, int threads>
struct StagedTile {
    using Element = Element_;
    static constexpr int kRows = rows, kColumns = columns, kDepth = depth, kStages = stages, kThreads = threads;
    static constexpr int kChunk = Chunk<Element>::kElements;
    static constexpr int kXPitch = kDepth + kChunk, kBasisPitch = kColumns + kChunk;
    static constexpr int kXElements = kRows * kXPitch;
    static constexpr int kStageElements = kXElements + kDepth * kBasisPitch;
    static constexpr int kPipelineBytes = kStages * kStageElements * static_cast<int>(sizeof(Element));
    static_assert(kStages >= 2, "one stage is filled while another is read");
};

template <typename Element, int rows, int columns, int stages, int warp_rows, int warp_columns>
struct MatrixTile : StagedTile<Element, rows, columns, 64, stages, 32 * warp_rows * warp_columns> {
    static constexpr int kWarps = warp_rows * warp_columns, kWarpColumns = warp_columns;
    // What a warp owns: fragments of 16 rows and of 8 columns, the columns always in pairs.
    static constexpr int kRowFragments = rows / warp_rows / 16, kColumnFragments = columns / warp_columns / 8;
    using Sums = float[kRowFragments][kColumnFragments][4];
    static constexpr int kPlanePitch = columns + 8, kPlaneElements = rows * kPlanePitch;
    static constexpr int kPlanesBytes = 2 * kPlaneElements * 2;
    // The Gram's tiles of 16 x 16 are dealt to the warps.
    static constexpr int kGramSide = columns / 16, kGramTiles = kGramSide * kGramSide;
    static constexpr int kGramTilesPerWarp = (kGramTiles + kWarps - 1) / kWarps;
    using GramSums = float[kGramTilesPerWarp][2][4];
    static_assert(rows % (16 * warp_rows) == 0 && columns % (16 * warp_columns) == 0, "whole fragments for every warp");
};

// Where the first of a thread's four numbers of a 16 x 8 fragment lies: the second is its right neighbour, the others
// are eight rows below.
__device__ __forceinline__ int fragment_row() { return static_cast<int>(threadIdx.x % 32 / 4); }
__device__ __forceinline__ int fragment_column() { return static_cast<int>(threadIdx.x % 4 * 2); }

// Copies the first `count` of a chunk's elements and fills the rest with zeros, one element at a time.
template <typename Element>
__device__ __forceinline__ void copy_elements(Element* shared, const Element* global, int count) {
    Chunk<Element> chunk;
#pragma unroll
    for (int i = 0; i < Chunk<Element>::kElements; ++i) chunk.elements[i] = i < count ? global[i] : Element{};
    *reinterpret_cast<Chunk<Element>*>(shared) = chunk;
}

// Starts copying columns first_column... of X and the same rows of V into a stage. What lies beyond either is zero: an
// element of X times zero would not be, where it is NaN.
template <typename Shape>
__device__ __forceinline__ void load_stage(typename Shape::Element* stage, const RowsOf<typename Shape::Element>& rows,
                                           const BasisOf<typename Shape::Element>& basis, int first_column) {
    using Element = typename Shape::Element;
    constexpr int kChunk = Shape::kChunk, kXChunks = Shape::kDepth / kChunk, kBasisChunks = Shape::kColumns / kChunk;
    constexpr int kRowStep = Shape::kThreads / kXChunks, kBytes = static_cast<int>(sizeof(Element));
    static_assert(Shape::kThreads % kXChunks == 0, "a thread copies the same columns of all its rows");
    const int offset = threadIdx.x % kXChunks * kChunk, first_row = threadIdx.x / kXChunks;
    const int left = rows.depth - first_column - offset, inside = left < 0 ? 0 : left < kChunk ? left : kChunk;
    const Element* source = rows.first + first_row * rows.stride + first_column + offset;
    Element* target = stage + first_row * Shape::kXPitch + offset;
    if (rows.aligned) {
#pragma unroll
        for (int row = first_row; row < Shape::kRows; row += kRowStep) {
            const int count = row < rows.count ? inside : 0;
            copy_async_16(target, count > 0 ? source : rows.first, count * kBytes);
            source += kRowStep * rows.stride;
            target += kRowStep * Shape::kXPitch;
        }
    } else {
#pragma unroll 1
        for (int row = first_row; row < Shape::kRows; row += kRowStep) {
            copy_elements(target, source, row < rows.count ? inside : 0);
            source += kRowStep * rows.stride;
            target += kRowStep * Shape::kXPitch;
        }
    }
#pragma unroll
    for (int i = threadIdx.x; i < Shape::kDepth * kBasisChunks; i += Shape::kThreads) {
        const int row = i / kBasisChunks, column = i % kBasisChunks * kChunk;
        const bool exists = first_column + row < rows.depth;
        const Element* v = exists ? basis.first + (first_column + row) * basis.stride + column : basis.first;
        copy_async_16(stage + Shape::kXElements + row * Shape::kBasisPitch + column, v, exists ? 16 : 0);
    }
}

// Streams X and V through the pipeline and calls multiply(x, v) with every pair of stages in shared memory.
template <typename Shape, typename Multiply>
__device__ __forceinline__ void stream_stages(unsigned char* pipeline, const RowsOf<typename Shape::Element>& rows,
                                              const BasisOf<typename Shape::Element>& basis, Multiply multiply) {
    using Element = typename Shape::Element;
    Element* stages = reinterpret_cast<Element*>(pipeline);
    const int steps = (rows.depth + Shape::kDepth - 1) / Shape::kDepth;
#pragma unroll 1
    for (int step = 0; step < Shape::kStages - 1; ++step) {
        if (step < steps) {
            load_stage<Shape>(stages + step * Shape::kStageElements, rows, basis, step * Shape::kDepth);
        }
        copy_async_commit();
    }
    int reading = 0, writing = Shape::kStages - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        // One group is committed per step, also where it is empty: all but the newest kStages - 2 have to be there.
        copy_async_wait<Shape::kStages - 2>();
        __syncthreads();  // everybody's copies are there, and everybody has read the stage that is overwritten now
        const int next = step + Shape::kStages - 1;
        if (next < steps) {
            load_stage<Shape>(stages + writing * Shape::kStageElements, rows, basis, next * Shape::kDepth);
        }
        copy_async_commit();
        const Element* x = stages + reading * Shape::kStageElements;
        multiply(x, x + Shape::kXElements);
        reading = reading + 1 == Shape::kStages ? 0 : reading + 1;
        writing = writing + 1 == Shape::kStages ? 0 : writing + 1;
    }
    __syncthreads();  // the pipeline's memory is free: no copy is left, only empty groups
}

template <typename Shape>
__device__ __forceinline__ void project_tile(typename Shape::Sums& sums, unsigned char* pipeline,
                                             const RowsOf<typename Shape::Element>& rows,
                                             const BasisOf<typename Shape::Element>& basis) {
    using Element = typename Shape::Element;
    constexpr int kPairs = Shape::kColumnFragments / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp / Shape::kWarpColumns * Shape::kRowFragments * 16;
    const int first_column = warp % Shape::kWarpColumns * Shape::kColumnFragments * 8;
#pragma unroll
    for (int i = 0; i < Shape::kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kColumnFragments; ++j) {
#pragma unroll
            for (int part = 0; part < 4; ++part) sums[i][j][part] = 0.0f;
        }
    }
    stream_stages<Shape>(pipeline, rows, basis, [&](const Element* x, const Element* v) {
        // Lane l points to row l % 16 and to the first or second eight columns of a 16 x 16 block.
        x += (first_row + lane % 16) * Shape::kXPitch + lane / 16 * 8;
        v += lane % 16 * Shape::kBasisPitch + first_column + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < Shape::kDepth; k += 16) {
            unsigned left[Shape::kRowFragments][4];
#pragma unroll
            for (int i = 0; i < Shape::kRowFragments; ++i) load_matrix_x4(left[i], x + i * 16 * Shape::kXPitch + k);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
                unsigned right[4];
                load_matrix_x4_transposed(right, v + k * Shape::kBasisPitch + pair * 16);
#pragma unroll
                for (int i = 0; i < Shape::kRowFragments; ++i) {
                    multiply_16x8x16<Element>(sums[i][2 * pair], left[i], right[0], right[1]);
                    multiply_16x8x16<Element>(sums[i][2 * pair + 1], left[i], right[2], right[3]);
                }
            }
        }
    });
}

// Calls visit(row, column, first, second) for every pair of neighbours that this thread holds of the tile.
template <typename Shape, typename Visit>
__device__ __forceinline__ void for_each_pair(const typename Shape::Sums& sums, Visit visit) {
    const int warp = threadIdx.x / 32;
    const int first_row = warp / Shape::kWarpColumns * Shape::kRowFragments * 16 + fragment_row();
    const int first_column = warp % Shape::kWarpColumns * Shape::kColumnFragments * 8 + fragment_column();
#pragma unroll
    for (int i = 0; i < Shape::kRowFragments; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < Shape::kColumnFragments; ++j) {
                visit(first_row + i * 16 + half * 8, first_column + j * 8, sums[i][j][2 * half],
                      sums[i][j][2 * half + 1]);
            }
        }
    }
}

template <typename Shape>
__device__ __forceinline__ void store_sums(float* target, long long stride, const typename Shape::Sums& sums,
                                           int count) {
    for_each_pair<Shape>(sums, [&](int row, int column, float first, float second) {
        if (row < count) *reinterpret_cast<FloatPair*>(target + row * stride + column) = {first, second};
    });
}

// Two neighbours as one word.
__device__ __forceinline__ unsigned pack(Bfloat16 first, Bfloat16 second) {
    return first.bits | static_cast<unsigned>(second.bits) << 16;
}

template <typename Shape>
__device__ __forceinline__ void store_planes(Bfloat16* planes, const typename Shape::Sums& sums, const float* weights,
                                             int count) {
    for_each_pair<Shape>(sums, [&](int row, int column, float first, float second) {
        if (weights != nullptr && row < count) {
            const float weight = weights[row], root = sqrt(weight);
            first = weight == 0.0f ? 0.0f : first * root;
            second = weight == 0.0f ? 0.0f : second * root;
        }
        const Bfloat16 high_first = round_to<Bfloat16>(first), high_second = round_to<Bfloat16>(second);
        unsigned* high = reinterpret_cast<unsigned*>(planes + row * Shape::kPlanePitch + column);
        unsigned* low = high + Shape::kPlaneElements / 2;
        *high = pack(high_first, high_second);
        *low =
            pack(round_to<Bfloat16>(first - to_float(high_first)), round_to<Bfloat16>(second - to_float(high_second)));
    });
}

template <typename Shape>
__device__ __forceinline__ void clear_gram(typename Shape::GramSums& gram) {
#pragma unroll
    for (int tile = 0; tile < Shape::kGramTilesPerWarp; ++tile) {
#pragma unroll
        for (int part = 0; part < 8; ++part) gram[tile][part / 4][part % 4] = 0.0f;
    }
}

template <typename Shape>
__device__ __forceinline__ void accumulate_gram(typename Shape::GramSums& gram, const Bfloat16* P, const Bfloat16* Q) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < Shape::kGramTilesPerWarp; ++tile) {
        const int number = warp * Shape::kGramTilesPerWarp + tile;
        if (number >= Shape::kGramTiles) continue;
        // P lies row by row as the product needs it column by column: its blocks are transposed, and so is their order.
        const Bfloat16* left = P + (lane % 8 + lane / 16 * 8) * Shape::kPlanePitch + lane / 8 % 2 * 8;
        const Bfloat16* right = Q + lane % 16 * Shape::kPlanePitch + lane / 16 * 8;
        left += number / Shape::kGramSide * 16;
        right += number % Shape::kGramSide * 16;
#pragma unroll 2
        for (int k = 0; k < Shape::kRows; k += 16) {
            unsigned left_high[4], left_low[4], right_high[4], right_low[4];
            load_matrix_x4_transposed(left_high, left + k * Shape::kPlanePitch);
            load_matrix_x4_transposed(left_low, left + k * Shape::kPlanePitch + Shape::kPlaneElements);
            load_matrix_x4_transposed(right_high, right + k * Shape::kPlanePitch);
            load_matrix_x4_transposed(right_low, right + k * Shape::kPlanePitch + Shape::kPlaneElements);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int b0 = 2 * half, b1 = 2 * half + 1;
                multiply_16x8x16<Bfloat16>(gram[tile][half], left_high, right_low[b0], right_low[b1]);
                multiply_16x8x16<Bfloat16>(gram[tile][half], left_low, right_high[b0], right_high[b1]);
                multiply_16x8x16<Bfloat16>(gram[tile][half], left_high, right_high[b0], right_high[b1]);
            }
        }
    }
}

template <typename Shape>
__device__ __forceinline__ void store_gram(float* target, long long stride, const typename Shape::GramSums& gram) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int tile = 0; tile < Shape::kGramTilesPerWarp; ++tile) {
        const int number = warp * Shape::kGramTilesPerWarp + tile;
        if (number >= Shape::kGramTiles) continue;
        const int first_row = number / Shape::kGramSide * 16 + fragment_row();
        const int first_column = number % Shape::kGramSide * 16 + fragment_column();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                target[(first_row + part / 2 * 8) * stride + first_column + half * 8 + part % 2] =
                    gram[tile][half][part];
            }
        }
    }
}

}  // namespace sstmerge::device
