// Q (w o (Q^T D C X P)) P^T for a batch of cores C: one block per core, the products in shared memory.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

// out (rows x columns) = left (rows x inner) right (inner x columns), every element by one thread. An element (i, j) of
// a factor lies at i * row_stride + j * column_stride, which makes a transpose a matter of strides.
template <typename Scalar>
__device__ __forceinline__ void multiply(Scalar* out, const Scalar* left, int left_row_stride, int left_column_stride,
                                         const Scalar* right, int right_row_stride, int right_column_stride, int rows,
                                         int inner, int columns) {
    for (int element = threadIdx.x; element < rows * columns; element += blockDim.x) {
        const int i = element / columns, j = element % columns;
        Scalar sum = 0;
        for (int k = 0; k < inner; ++k) {
            sum += left[i * left_row_stride + k * left_column_stride] *
                   right[k * right_row_stride + j * right_column_stride];
        }
        out[element] = sum;
    }
    __syncthreads();
}

// All matrices are contiguous and row-major: cores, weights and filtered (batch, rows, columns), Q and D (batch, rows,
// rows), P and X (batch, columns, columns). Shared memory: 2 * rows * columns elements.
template <typename Scalar>
__device__ __forceinline__ void filter_cores(const Scalar* __restrict__ cores, const Scalar* __restrict__ Q,
                                             const Scalar* __restrict__ D, const Scalar* __restrict__ P,
                                             const Scalar* __restrict__ X, const Scalar* __restrict__ weights,
                                             Scalar* __restrict__ filtered, int rows, int columns) {
    SSTMERGE_SHARED_MEMORY(shared);
    const long long core = blockIdx.x, size = static_cast<long long>(rows) * columns;
    Scalar* first = reinterpret_cast<Scalar*>(shared);
    Scalar* second = first + size;
    Q += core * rows * rows;
    D += core * rows * rows;
    P += core * columns * columns;
    X += core * columns * columns;
    multiply(first, D, rows, 1, cores + core * size, columns, 1, rows, rows, columns);
    multiply(second, Q, 1, rows, first, columns, 1, rows, rows, columns);
    multiply(first, second, columns, 1, X, columns, 1, rows, columns, columns);
    multiply(second, first, columns, 1, P, columns, 1, rows, columns, columns);
    for (long long element = threadIdx.x; element < size; element += blockDim.x) {
        second[element] *= weights[core * size + element];
    }
    __syncthreads();
    multiply(first, Q, rows, 1, second, columns, 1, rows, rows, columns);
    multiply(filtered + core * size, first, columns, 1, P, 1, columns, rows, columns, columns);
}

}  // namespace sstmerge::device

extern "C" __global__ void __launch_bounds__(256)
    filter_cores_float32(const float* cores, const float* Q, const float* D, const float* P, const float* X,
                         const float* weights, float* filtered, int rows, int columns) {
    sstmerge::device::filter_cores(cores, Q, D, P, X, weights, filtered, rows, columns);
}

extern "C" __global__ void __launch_bounds__(256)
    filter_cores_float64(const double* cores, const double* Q, const double* D, const double* P, const double* X,
                         const double* weights, double* filtered, int rows, int columns) {
    sstmerge::device::filter_cores(cores, Q, D, P, X, weights, filtered, rows, columns);
}

#define SSTMERGE_FILTER_CORES_KERNELS(entry) entry(filter_cores_float32) entry(filter_cores_float64)
