// Scores of sequences from the tokens themselves: both sides projected, and their products summed, in one pass over X
// and the gradient, with nothing but the sums written. For half precision and up to 64 columns of both bases.
#pragma once

#include "sequence_chunks.cuh"
#include "tile.cuh"

namespace sstmerge::device {

// One side of the projection: tokens (tokens x depth), `stride` elements from row to row, and a basis (depth x
// kColumns) that is padded with zeros; `aligned`: address and stride of the tokens are multiples of 16 bytes.
template <typename Element>
struct ProjectedSide {
    const Element* tokens;
    long long stride;
    int depth, aligned;
    const Element* basis;
};

template <typename Shape>
__device__ __forceinline__ void project_side(typename Shape::Sums& sums, unsigned char* pipeline,
                                             const ProjectedSide<typename Shape::Element>& side, long long first,
                                             int count) {
    using Element = typename Shape::Element;
    const RowsOf<Element> rows{side.tokens + first * side.stride, side.stride, count, side.depth, side.aligned != 0};
    project_tile<Shape>(sums, pipeline, rows, BasisOf<Element>{side.basis, Shape::kColumns});
}

// Writes the first rows and columns of a Gram, contiguously; NaN where the chunk was not valid. All threads; `staging`
// holds kColumns x kColumns floats and is free again afterwards.
template <typename Shape>
__device__ __forceinline__ void store_partial(float* __restrict__ out, float* staging,
                                              const typename Shape::GramSums& gram, int rows, int columns, bool valid) {
    store_gram<Shape>(staging, Shape::kColumns, gram);
    __syncthreads();
    for (int element = threadIdx.x; element < rows * columns; element += Shape::kThreads) {
        const float value = staging[element / columns * Shape::kColumns + element % columns];
        out[element] = valid ? value : not_a_number();
    }
    __syncthreads();
}

template <typename Shape>
__device__ __forceinline__ void store_projected(float* __restrict__ projected, const typename Shape::Sums& sums,
                                                int count, int columns) {
    for_each_pair<Shape>(sums, [&](int row, int column, float first, float second) {
        float* target = projected + static_cast<long long>(row) * columns + column;
        if (row < count && column < columns) target[0] = first;
        if (row < count && column + 1 < columns) target[1] = second;
    });
}

// One block per chunk. The sums over the chunk's tokens, `rows` = R_o and `columns` = R_i: scores (rows x columns), and
// where they are not null inputs (columns x columns) and outputs (rows x rows), the Grams of both sides, and projected
// (tokens x rows), the projected gradient. Shared memory: kPipelineBytes + 2 * kPlanesBytes.
template <typename Shape>
__device__ __forceinline__ void fused_scores(const ProjectedSide<typename Shape::Element>& x,
                                             const ProjectedSide<typename Shape::Element>& gradient,
                                             const long long* __restrict__ spans, long long tokens, int chunks,
                                             int rows, int columns, float* __restrict__ scores,
                                             float* __restrict__ inputs, float* __restrict__ outputs,
                                             float* __restrict__ projected) {
    SSTMERGE_SHARED_MEMORY(shared);
    Bfloat16* x_planes = reinterpret_cast<Bfloat16*>(shared + Shape::kPipelineBytes);
    Bfloat16* gradient_planes = x_planes + 2 * Shape::kPlaneElements;
    const SequenceChunk chunk = find_chunk(spans, tokens, blockIdx.x, chunks, Shape::kRows);
    typename Shape::GramSums score_sums, input_sums, output_sums;
    clear_gram<Shape>(score_sums);
    clear_gram<Shape>(input_sums);
    clear_gram<Shape>(output_sums);
#pragma unroll 1
    for (long long done = 0; done < chunk.rows; done += Shape::kRows) {
        const long long first = chunk.first + done, left = chunk.rows - done;
        const int count = left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
        typename Shape::Sums sums;
        // The barriers inside the projection part what follows it from the products of the previous tile.
        project_side<Shape>(sums, shared, x, first, count);
        store_planes<Shape>(x_planes, sums, nullptr, count);
        project_side<Shape>(sums, shared, gradient, first, count);
        store_planes<Shape>(gradient_planes, sums, nullptr, count);
        if (projected != nullptr) store_projected<Shape>(projected + first * rows, sums, count, rows);
        __syncthreads();  // everybody's planes are there
        accumulate_gram<Shape>(score_sums, gradient_planes, x_planes);
        if (inputs != nullptr) accumulate_gram<Shape>(input_sums, x_planes, x_planes);
        if (outputs != nullptr) accumulate_gram<Shape>(output_sums, gradient_planes, gradient_planes);
    }
    float* staging = reinterpret_cast<float*>(shared);
    static_assert(Shape::kColumns * Shape::kColumns * 4 <= Shape::kPipelineBytes, "a Gram fits where the pipeline was");
    const long long unit = blockIdx.x;
    store_partial<Shape>(scores + unit * rows * columns, staging, score_sums, rows, columns, chunk.valid);
    if (inputs != nullptr) {
        store_partial<Shape>(inputs + unit * columns * columns, staging, input_sums, columns, columns, chunk.valid);
    }
    if (outputs != nullptr) {
        store_partial<Shape>(outputs + unit * rows * rows, staging, output_sums, rows, rows, chunk.valid);
    }
}

}  // namespace sstmerge::device

// fused_scores_<dtype>_<columns>x<rows>: bases padded to `columns` columns, tiles of `rows` tokens. The larger tiles
// read the bases half as often, the smaller ones fit into the 99 KB of shared memory that every GPU has. `blocks` share
// a multiprocessor, as far as shared memory allows.
#define SSTMERGE_FUSED_SCORES(name, Element, tile_rows, tile_columns, warp_rows, warp_columns, blocks)                \
    extern "C" __global__ void __launch_bounds__(32 * warp_rows * warp_columns, blocks)                               \
        fused_scores_##name(const sstmerge::device::Element* x, long long x_stride, int x_depth, int x_aligned,       \
                            const sstmerge::device::Element* V, const sstmerge::device::Element* gradient,            \
                            long long gradient_stride, int gradient_depth, int gradient_aligned,                      \
                            const sstmerge::device::Element* U, const long long* spans, long long tokens, int chunks, \
                            int rows, int columns, float* scores, float* inputs, float* outputs, float* projected) {  \
        using namespace sstmerge::device;                                                                             \
        fused_scores<MatrixTile<Element, tile_rows, tile_columns, 3, warp_rows, warp_columns>>(                       \
            {x, x_stride, x_depth, x_aligned, V}, {gradient, gradient_stride, gradient_depth, gradient_aligned, U},   \
            spans, tokens, chunks, rows, columns, scores, inputs, outputs, projected);                                \
    }

SSTMERGE_FUSED_SCORES(bfloat16_16x64, Bfloat16, 64, 16, 4, 1, 2)
SSTMERGE_FUSED_SCORES(bfloat16_16x128, Bfloat16, 128, 16, 8, 1, 2)
SSTMERGE_FUSED_SCORES(bfloat16_32x64, Bfloat16, 64, 32, 4, 1, 2)
SSTMERGE_FUSED_SCORES(bfloat16_32x128, Bfloat16, 128, 32, 8, 1, 2)
SSTMERGE_FUSED_SCORES(bfloat16_64x64, Bfloat16, 64, 64, 4, 2, 2)
SSTMERGE_FUSED_SCORES(bfloat16_64x128, Bfloat16, 128, 64, 4, 2, 1)
SSTMERGE_FUSED_SCORES(float16_16x64, Float16, 64, 16, 4, 1, 2)
SSTMERGE_FUSED_SCORES(float16_16x128, Float16, 128, 16, 8, 1, 2)
SSTMERGE_FUSED_SCORES(float16_32x64, Float16, 64, 32, 4, 1, 2)
SSTMERGE_FUSED_SCORES(float16_32x128, Float16, 128, 32, 8, 1, 2)
SSTMERGE_FUSED_SCORES(float16_64x64, Float16, 64, 64, 4, 2, 2)
SSTMERGE_FUSED_SCORES(float16_64x128, Float16, 128, 64, 4, 2, 1)

#define SSTMERGE_FUSED_SCORES_OF(entry, type)                                                                \
    entry(fused_scores_##type##_16x64) entry(fused_scores_##type##_32x64) entry(fused_scores_##type##_64x64) \
        entry(fused_scores_##type##_16x128) entry(fused_scores_##type##_32x128) entry(fused_scores_##type##_64x128)
#define SSTMERGE_FUSED_SCORES_KERNELS(entry) \
    SSTMERGE_FUSED_SCORES_OF(entry, bfloat16) SSTMERGE_FUSED_SCORES_OF(entry, float16)
