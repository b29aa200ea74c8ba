// What the kernels of generalized_eigh share: reading a problem, and bringing it to a size at which nothing overflows.
#pragma once

#include "primitives.cuh"

namespace sstmerge::device {

constexpr int kWarpSize = 32;
constexpr int kMaximalWarps = 32;

// Codes of one problem, equal to those of SolveStatus in csrc/generalized_eigh.h.
constexpr int kConverged = 0;
constexpr int kNotPositiveDefinite = 1;
constexpr int kNotConverged = 2;
constexpr int kNonFiniteInput = 3;

template <typename Scalar>
__device__ __forceinline__ Scalar not_a_number() {
    return __uint_as_float(0x7FC00000u);
}

// A batch of symmetric matrices of which only the lower triangles are read; strides in elements.
template <typename Scalar>
struct SymmetricBatch {
    const Scalar* data;
    long long batch_stride, row_stride, column_stride;

    __device__ __forceinline__ Scalar at(long long problem, int i, int j) const {
        const int row = i > j ? i : j, column = i > j ? j : i;
        return data[problem * batch_stride + row * row_stride + column * column_stride];
    }
};

// The maximum over the block, which every thread gets; `partial` has room for kMaximalWarps and may be used again.
template <typename Scalar>
__device__ __forceinline__ Scalar block_maximum(Scalar value, Scalar* partial) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value = fmax(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
    }
    const int warps = blockDim.x / kWarpSize;
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    for (int warp = 0; warp < warps; ++warp) value = fmax(value, partial[warp]);
    __syncthreads();
    return value;
}

// The e with magnitude / 2^e in [1/2, 1); 0 for 0.
template <typename Scalar>
__device__ __forceinline__ int exponent_of(Scalar magnitude) {
    return magnitude > 0 ? ilogb(magnitude) + 1 : 0;
}

// How a problem is scaled before it is solved: a / 2^a and b / 2^b, by powers of two, which round nothing. Eigenvalues
// have to be multiplied by 2^(a - b) and eigenvectors by 2^(-b / 2); b is even.
struct Exponents {
    bool finite;  // whether all of the lower triangles is
    int a, b;
};

// Looks through the lower triangles of one problem. `partial` has room for kMaximalWarps.
template <typename Scalar>
__device__ __forceinline__ Exponents find_exponents(const SymmetricBatch<Scalar>& a, const SymmetricBatch<Scalar>& b,
                                                    long long problem, int n, Scalar* partial) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    Scalar largest_a = 0, largest_b = 0;
    bool finite = true;
    for (int i = warp; i < n; i += warps) {
        for (int j = lane; j <= i; j += kWarpSize) {
            const Scalar x = a.at(problem, i, j), y = b.at(problem, i, j);
            finite = finite && isfinite(x) && isfinite(y);
            largest_a = fmax(largest_a, fabs(x));
            // A positive definite matrix has its largest element on the diagonal.
            if (i == j) largest_b = fmax(largest_b, y);
        }
    }
    Exponents exponents{__syncthreads_or(!finite) == 0, 0, 0};
    if (!exponents.finite) return exponents;
    exponents.a = exponent_of(block_maximum(largest_a, partial));
    exponents.b = exponent_of(block_maximum(largest_b, partial));
    exponents.b += exponents.b & 1;
    return exponents;
}

}  // namespace sstmerge::device
