// What follows the partial sums of the chunks: scores of whole sequences, and their weighted sums. Every sum runs in
// double, in an order that depends on nothing but the shapes.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

constexpr int kSumColumns = 32;

// Adds up what the slices of a block hold of one element, in the order of the slices, onto `total`.
__device__ __forceinline__ void add_slices(double* by_slice, double value, int slice, int column, int slices,
                                           double* total) {
    by_slice[slice * kSumColumns + column] = value;
    __syncthreads();
    if (slice == 0 && total != nullptr) {
        double sum = 0;
        for (int other = 0; other < slices; ++other) sum += by_slice[other * kSumColumns + column];
        *total += sum;
    }
    __syncthreads();
}

}  // namespace sstmerge::device

// scores[s] = sum over the chunks of sequence s of its partials, `size` elements each. Grid: all elements, in x.
extern "C" __global__ void __launch_bounds__(256)
    sum_chunks(const float* partials, long long sequences, int chunks, long long size, float* scores) {
    const long long element = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= sequences * size) return;
    const float* partial = partials + element / size * chunks * size + element % size;
    double sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * size];
    scores[element] = static_cast<float>(sum);
}

// sums += the sum over u < units of w value_u, square_sums += that of w value_u^2 (either may be null), for values of
// `size` elements and w = weights[u / per_weight], 1 where weights is null. A block owns 32 elements; its slices of 32
// threads take every `slices`-th unit. Values of weight 0 are left out, whatever they are. Shared memory: one double
// per thread.
extern "C" __global__ void __launch_bounds__(1024)
    sum_sequences(const float* values, const float* weights, long long units, int per_weight, long long size,
                  double* sums, double* square_sums) {
    using namespace sstmerge::device;
    SSTMERGE_SHARED_MEMORY(shared);
    double* by_slice = reinterpret_cast<double*>(shared);
    const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns, slices = blockDim.x / kSumColumns;
    const long long element = static_cast<long long>(blockIdx.x) * kSumColumns + column;
    double sum = 0, square_sum = 0;
    if (element < size) {
#pragma unroll 4
        for (long long unit = slice; unit < units; unit += slices) {
            const double weight = weights == nullptr ? 1.0 : static_cast<double>(weights[unit / per_weight]);
            const double value = weight == 0 ? 0.0 : static_cast<double>(values[unit * size + element]);
            sum += weight * value;
            square_sum += weight * value * value;
        }
    }
    const bool owned = element < size;
    add_slices(by_slice, sum, slice, column, slices, owned && sums != nullptr ? sums + element : nullptr);
    add_slices(by_slice, square_sum, slice, column, slices,
               owned && square_sums != nullptr ? square_sums + element : nullptr);
}

#define SSTMERGE_SCORE_EPILOGUES_KERNELS(entry) entry(sum_chunks) entry(sum_sequences)
