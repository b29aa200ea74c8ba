// Projections Y = X V of tall matrices, and the sums of their outer products, in one pass over X.
//
// Blocks take tiles of rows in turn. Where V has at most 64 columns, the Gram of a block's tiles stays in its registers
// until it is done: partial sums in float, one matrix per block, which project_partials.cuh adds in double.
#pragma once

#include "tile.cuh"

namespace sstmerge::device {

template <typename Element>
using Tile128x16 = MatrixTile<Element, 128, 16, 4, 8, 1>;
template <typename Element>
using Tile128x32 = MatrixTile<Element, 128, 32, 4, 8, 1>;
template <typename Element>
using Tile128x64 = MatrixTile<Element, 128, 64, 4, 4, 2>;
template <typename Element>
using Tile128x96 = MatrixTile<Element, 128, 96, 3, 4, 2>;
template <typename Element>
using Tile128x128 = MatrixTile<Element, 128, 128, 3, 4, 2>;
template <typename Element>
using Tile64x16 = MatrixTile<Element, 64, 16, 6, 4, 1>;
template <typename Element>
using Tile64x32 = MatrixTile<Element, 64, 32, 6, 4, 2>;
template <typename Element>
using Tile64x64 = MatrixTile<Element, 64, 64, 5, 4, 2>;
template <typename Element>
using Tile64x96 = MatrixTile<Element, 64, 96, 4, 4, 2>;
template <typename Element>
using Tile64x128 = MatrixTile<Element, 64, 128, 3, 4, 2>;

// X (count x depth) with rows `stride` apart; V (depth x columns) and Y (count x columns) contiguous. Columns are a
// multiple of the tile's.
template <typename Element>
struct Projection {
    const Element* x;
    long long stride, count;
    int depth, aligned;
    const Element* basis;
    int columns;
    float* projections;
};

// Calls visit(first_row, rows, basis, target) for the tiles of this block. Tiles of the same rows are neighbours, so
// that all but one of them find these in the cache.
template <typename Shape, typename Visit>
__device__ __forceinline__ void for_each_tile(const Projection<typename Shape::Element>& all, Visit visit) {
    using Element = typename Shape::Element;
    const int column_tiles = all.columns / Shape::kColumns;
    const long long tiles = (all.count + Shape::kRows - 1) / Shape::kRows * column_tiles;
#pragma unroll 1
    for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long long first_row = tile / column_tiles * Shape::kRows, left = all.count - first_row;
        const int first_column = static_cast<int>(tile % column_tiles) * Shape::kColumns;
        const RowsOf<Element> rows = {all.x + first_row * all.stride, all.stride,
                                      static_cast<int>(left < Shape::kRows ? left : Shape::kRows), all.depth,
                                      all.aligned != 0};
        const BasisOf<Element> basis = {all.basis + first_column, all.columns};
        visit(first_row, rows, basis, all.projections + first_row * all.columns + first_column);
    }
}

// Shared memory: Shape::kPipelineBytes.
template <typename Shape>
__device__ __forceinline__ void project(const Projection<typename Shape::Element>& all) {
    using Element = typename Shape::Element;
    SSTMERGE_SHARED_MEMORY(shared);
    for_each_tile<Shape>(all,
                         [&](long long, const RowsOf<Element>& rows, const BasisOf<Element>& basis, float* target) {
                             typename Shape::Sums sums;
                             project_tile<Shape>(sums, shared, rows, basis);
                             store_sums<Shape>(target, all.columns, sums, rows.count);
                         });
}

// The same for as many columns as a tile has; adds up w y y^T over the rows y of Y. `weights` (count) may be null;
// `partials` (blocks, columns, columns) is null where no Gram is wanted. Shared memory: Shape::kPipelineBytes.
template <typename Shape>
__device__ __forceinline__ void project_with_gram(const Projection<typename Shape::Element>& all, const float* weights,
                                                  float* partials) {
    using Element = typename Shape::Element;
    static_assert(Shape::kPlanesBytes <= Shape::kPipelineBytes, "the planes take the place of the pipeline");
    SSTMERGE_SHARED_MEMORY(shared);
    Bfloat16* planes = reinterpret_cast<Bfloat16*>(shared);
    typename Shape::GramSums gram;
    clear_gram<Shape>(gram);
    for_each_tile<Shape>(
        all, [&](long long first_row, const RowsOf<Element>& rows, const BasisOf<Element>& basis, float* target) {
            typename Shape::Sums sums;
            project_tile<Shape>(sums, shared, rows, basis);
            store_sums<Shape>(target, all.columns, sums, rows.count);
            if (partials == nullptr) return;
            store_planes<Shape>(planes, sums, weights == nullptr ? nullptr : weights + first_row, rows.count);
            __syncthreads();  // the planes are complete
            accumulate_gram<Shape>(gram, planes, planes);
            __syncthreads();  // the planes were read, and become the pipeline again
        });
    if (partials == nullptr) return;
    store_gram<Shape>(partials + static_cast<long long>(blockIdx.x) * Shape::kColumns * Shape::kColumns,
                      Shape::kColumns, gram);
}

// Tiles of single precision, multiplied without tensor cores, which would round. A thread owns four neighbouring
// columns of kRowSums rows.
template <int rows, int columns, int stages>
struct FloatTile : StagedTile<float, rows, columns, 32, stages, 256> {
    static constexpr int kColumnThreads = columns / 4, kRowThreads = 256 / kColumnThreads;
    static constexpr int kRowSums = rows / kRowThreads;
    static_assert(kRowSums * kRowThreads == rows, "every thread has the same number of rows");
};
using FloatTile128x16 = FloatTile<128, 16, 4>;
using FloatTile128x32 = FloatTile<128, 32, 4>;
using FloatTile128x64 = FloatTile<128, 64, 3>;
using FloatTile64x16 = FloatTile<64, 16, 6>;
using FloatTile64x32 = FloatTile<64, 32, 6>;
using FloatTile64x64 = FloatTile<64, 64, 4>;

// Shared memory: Shape::kPipelineBytes.
template <typename Shape>
__device__ __forceinline__ void project_float32(const Projection<float>& all) {
    SSTMERGE_SHARED_MEMORY(shared);
    const int column = static_cast<int>(threadIdx.x % Shape::kColumnThreads) * 4;
    const int first_row = static_cast<int>(threadIdx.x / Shape::kColumnThreads);
    for_each_tile<Shape>(all, [&](long long, const RowsOf<float>& rows, const BasisOf<float>& basis, float* target) {
        Chunk<float> sums[Shape::kRowSums] = {};
        stream_stages<Shape>(shared, rows, basis, [&](const float* x, const float* v) {
#pragma unroll
            for (int k = 0; k < Shape::kDepth; k += 4) {
                Chunk<float> right[4];
#pragma unroll
                for (int inner = 0; inner < 4; ++inner) {
                    right[inner] =
                        *reinterpret_cast<const Chunk<float>*>(v + (k + inner) * Shape::kBasisPitch + column);
                }
#pragma unroll
                for (int i = 0; i < Shape::kRowSums; ++i) {
                    const int row = first_row + i * Shape::kRowThreads;
                    const Chunk<float> left = *reinterpret_cast<const Chunk<float>*>(x + row * Shape::kXPitch + k);
#pragma unroll
                    for (int inner = 0; inner < 4; ++inner) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            sums[i].elements[j] += left.elements[inner] * right[inner].elements[j];
                        }
                    }
                }
            }
        });
#pragma unroll
        for (int i = 0; i < Shape::kRowSums; ++i) {
            const int row = first_row + i * Shape::kRowThreads;
            if (row < rows.count) {
                *reinterpret_cast<Chunk<float>*>(target + static_cast<long long>(row) * all.columns + column) = sums[i];
            }
        }
    });
}

}  // namespace sstmerge::device

// Two blocks per multiprocessor, so that one computes its Gram while the other one's copies are under way.
#define SSTMERGE_DEFINE_PROJECT_WITH_GRAM(name, Element, Tile)                                                   \
    extern "C" __global__ void __launch_bounds__(sstmerge::device::Tile<sstmerge::device::Element>::kThreads, 2) \
        name(const sstmerge::device::Element* x, long long stride, long long count, int depth, int aligned,      \
             const sstmerge::device::Element* basis, int columns, float* projections, const float* weights,      \
             float* partials) {                                                                                  \
        sstmerge::device::project_with_gram<sstmerge::device::Tile<sstmerge::device::Element>>(                  \
            {x, stride, count, depth, aligned, basis, columns, projections}, weights, partials);                 \
    }
#define SSTMERGE_DEFINE_PROJECT(name, Element, Tile)                                                             \
    extern "C" __global__ void __launch_bounds__(sstmerge::device::Tile<sstmerge::device::Element>::kThreads, 2) \
        name(const sstmerge::device::Element* x, long long stride, long long count, int depth, int aligned,      \
             const sstmerge::device::Element* basis, int columns, float* projections) {                          \
        sstmerge::device::project<sstmerge::device::Tile<sstmerge::device::Element>>(                            \
            {x, stride, count, depth, aligned, basis, columns, projections});                                    \
    }
#define SSTMERGE_DEFINE_PROJECT_FLOAT32(name, Tile)                                                         \
    extern "C" __global__ void __launch_bounds__(sstmerge::device::Tile::kThreads, 2)                       \
        name(const float* x, long long stride, long long count, int depth, int aligned, const float* basis, \
             int columns, float* projections) {                                                             \
        sstmerge::device::project_float32<sstmerge::device::Tile>(                                          \
            {x, stride, count, depth, aligned, basis, columns, projections});                               \
    }

SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_128x16, Bfloat16, Tile128x16)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_128x32, Bfloat16, Tile128x32)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_128x64, Bfloat16, Tile128x64)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_64x16, Bfloat16, Tile64x16)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_64x32, Bfloat16, Tile64x32)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_bfloat16_64x64, Bfloat16, Tile64x64)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_128x16, Float16, Tile128x16)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_128x32, Float16, Tile128x32)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_128x64, Float16, Tile128x64)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_64x16, Float16, Tile64x16)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_64x32, Float16, Tile64x32)
SSTMERGE_DEFINE_PROJECT_WITH_GRAM(project_float16_64x64, Float16, Tile64x64)
SSTMERGE_DEFINE_PROJECT(project_bfloat16_128x96, Bfloat16, Tile128x96)
SSTMERGE_DEFINE_PROJECT(project_bfloat16_128x128, Bfloat16, Tile128x128)
SSTMERGE_DEFINE_PROJECT(project_bfloat16_64x96, Bfloat16, Tile64x96)
SSTMERGE_DEFINE_PROJECT(project_bfloat16_64x128, Bfloat16, Tile64x128)
SSTMERGE_DEFINE_PROJECT(project_float16_128x96, Float16, Tile128x96)
SSTMERGE_DEFINE_PROJECT(project_float16_128x128, Float16, Tile128x128)
SSTMERGE_DEFINE_PROJECT(project_float16_64x96, Float16, Tile64x96)
SSTMERGE_DEFINE_PROJECT(project_float16_64x128, Float16, Tile64x128)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_128x16, FloatTile128x16)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_128x32, FloatTile128x32)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_128x64, FloatTile128x64)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_64x16, FloatTile64x16)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_64x32, FloatTile64x32)
SSTMERGE_DEFINE_PROJECT_FLOAT32(project_float32_64x64, FloatTile64x64)

#define SSTMERGE_PROJECT_TILES(entry, type)                                                      \
    entry(project_##type##_128x16) entry(project_##type##_128x32) entry(project_##type##_128x64) \
        entry(project_##type##_64x16) entry(project_##type##_64x32) entry(project_##type##_64x64)
#define SSTMERGE_PROJECT_WIDE_TILES(entry, type)                                                 \
    entry(project_##type##_128x96) entry(project_##type##_128x128) entry(project_##type##_64x96) \
        entry(project_##type##_64x128)
#define SSTMERGE_PROJECT_KERNELS(entry)          \
    SSTMERGE_PROJECT_TILES(entry, bfloat16)      \
    SSTMERGE_PROJECT_WIDE_TILES(entry, bfloat16) \
    SSTMERGE_PROJECT_TILES(entry, float16)       \
    SSTMERGE_PROJECT_WIDE_TILES(entry, float16) SSTMERGE_PROJECT_TILES(entry, float32)
