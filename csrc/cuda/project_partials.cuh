// The partial sums that blocks of project.cuh leave, added in a fixed order in double.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

// covariance (columns x columns, contiguous) += the block of rows and columns first... of all partials (count, pitch,
// pitch). 8 threads share an element and add every eighth partial; the upper triangle is mirrored, so that what is
// added is exactly symmetric. Blocks of 256 threads for every 32 elements. Shared memory: 256 doubles.
__device__ __forceinline__ void add_partials(const float* __restrict__ partials, int count, int pitch, int first,
                                             double* __restrict__ covariance, int columns) {
    SSTMERGE_SHARED_MEMORY(shared);
    double* sums = reinterpret_cast<double*>(shared);
    const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
    const long long element = static_cast<long long>(blockIdx.x) * 32 + lane;
    const int i = static_cast<int>(element / columns), j = static_cast<int>(element % columns);
    double sum = 0.0;
    if (i <= j) {
        const float* source = partials + static_cast<long long>(first + i) * pitch + first + j;
#pragma unroll 4
        for (int partial = slice; partial < count; partial += 8) {
            sum += static_cast<double>(source[static_cast<long long>(partial) * pitch * pitch]);
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (slice > 0 || i > j) return;
    for (int other = 1; other < 8; ++other) sum += sums[other * 32 + lane];
    covariance[static_cast<long long>(i) * columns + j] += sum;
    if (i != j) covariance[static_cast<long long>(j) * columns + i] += sum;
}

}  // namespace sstmerge::device

extern "C" __global__ void __launch_bounds__(256)
    add_gram_partials(const float* partials, int count, int pitch, int first, double* covariance, int columns) {
    sstmerge::device::add_partials(partials, count, pitch, first, covariance, columns);
}

#define SSTMERGE_PROJECT_PARTIALS_KERNELS(entry) entry(add_gram_partials)
