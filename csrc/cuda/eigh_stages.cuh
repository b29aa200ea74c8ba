// What generalized_eigh does before, between and after the calls of cuSOLVER and cuBLAS: every problem is scaled, one
// that cannot go on is replaced by the identity, so that it disturbs no other, and its status is remembered.
#pragma once

#include "eigh_input.cuh"
#include "primitives.cuh"

namespace sstmerge::device {

// A batch of contiguous n x n matrices that the library calls overwrite.
template <typename Scalar>
struct Workspace {
    Scalar* reduced;  // a, then L^-1 a L^-T, then the eigenvectors
    Scalar* factor;   // b, then its Cholesky factor L
    int n;

    __device__ __forceinline__ long long offset(long long problem) const { return problem * n * n; }
};

template <typename Scalar>
__device__ __forceinline__ void set_identity(Scalar* matrix, int n) {
    for (int i = threadIdx.x / kWarpSize; i < n; i += blockDim.x / kWarpSize) {
        for (int j = threadIdx.x % kWarpSize; j < n; j += kWarpSize) {
            matrix[static_cast<long long>(i) * n + j] = i == j ? 1 : 0;
        }
    }
}

// Copies both matrices in full, from their lower triangles, so that row-major and column-major are the same. The
// pointers for the batched routines are left out where they are null. Shared memory: kMaximalWarps elements.
template <typename Scalar>
__device__ __forceinline__ void prepare(const SymmetricBatch<Scalar>& a, const SymmetricBatch<Scalar>& b,
                                        const Workspace<Scalar>& workspace, Scalar** reduced_pointers,
                                        Scalar** factor_pointers, int* exponents, int* outcome) {
    SSTMERGE_SHARED_MEMORY(shared);
    const long long problem = blockIdx.x;
    const int n = workspace.n;
    Scalar* reduced = workspace.reduced + workspace.offset(problem);
    Scalar* factor = workspace.factor + workspace.offset(problem);
    const Exponents found = find_exponents(a, b, problem, n, reinterpret_cast<Scalar*>(shared));
    if (threadIdx.x == 0) {
        outcome[problem] = found.finite ? kConverged : kNonFiniteInput;
        exponents[2 * problem] = found.a;
        exponents[2 * problem + 1] = found.b;
        if (reduced_pointers != nullptr) reduced_pointers[problem] = reduced;
        if (factor_pointers != nullptr) factor_pointers[problem] = factor;
    }
    if (!found.finite) {
        set_identity(reduced, n);
        set_identity(factor, n);
        return;
    }
    for (int i = threadIdx.x / kWarpSize; i < n; i += blockDim.x / kWarpSize) {
        for (int j = threadIdx.x % kWarpSize; j < n; j += kWarpSize) {
            const long long element = static_cast<long long>(i) * n + j;
            reduced[element] = ldexp(a.at(problem, i, j), -found.a);
            factor[element] = ldexp(b.at(problem, i, j), -found.b);
        }
    }
}

// After the factorisation: `info` is not zero where b is not positive definite.
template <typename Scalar>
__device__ __forceinline__ void check_factor(const Workspace<Scalar>& workspace, const int* info, int* outcome) {
    const long long problem = blockIdx.x;
    if (info[problem] == 0) return;
    set_identity(workspace.reduced + workspace.offset(problem), workspace.n);
    set_identity(workspace.factor + workspace.offset(problem), workspace.n);
    if (threadIdx.x == 0) outcome[problem] = kNotPositiveDefinite;
}

// After the triangular solves: a tiny b under a large a may have overflowed.
template <typename Scalar>
__device__ __forceinline__ void check_reduced(const Workspace<Scalar>& workspace, int* outcome) {
    const long long problem = blockIdx.x, size = workspace.offset(1);
    Scalar* reduced = workspace.reduced + workspace.offset(problem);
    bool finite = true;
    for (long long element = threadIdx.x; element < size; element += blockDim.x) {
        finite = finite && isfinite(reduced[element]);
    }
    if (!__syncthreads_or(!finite)) return;
    set_identity(reduced, workspace.n);
    if (threadIdx.x == 0) outcome[problem] = kNotConverged;
}

// The status of a problem from what was remembered and from the eigensolver's `info`, which, of a generalized solver,
// is larger than n where b is not positive definite.
template <typename Scalar>
__device__ __forceinline__ int final_status(int outcome, int info, bool generalized, const Scalar* values, int exponent,
                                            int n) {
    bool finite = true;
    for (int i = threadIdx.x; i < n; i += blockDim.x) finite = finite && isfinite(ldexp(values[i], exponent));
    const bool overflowed = __syncthreads_or(!finite) != 0;
    if (outcome != kConverged) return outcome;
    if (generalized && info > n) return kNotPositiveDefinite;
    return info != 0 || overflowed ? kNotConverged : kConverged;
}

// Writes the unscaled solution, or NaN, and the status: block (problem, band) has the 32 rows of a band, which it turns
// from columns into rows in shared memory, 32 x 33 elements. The columns of `vectors` are contiguous.
template <typename Scalar>
__device__ __forceinline__ void finish(const Scalar* __restrict__ values, const Scalar* __restrict__ vectors,
                                       const int* __restrict__ exponents, const int* __restrict__ info, int generalized,
                                       const int* __restrict__ outcome, Scalar* __restrict__ eigenvalues,
                                       Scalar* __restrict__ eigenvectors, int* __restrict__ status, int n) {
    SSTMERGE_SHARED_MEMORY(shared);
    Scalar* tile = reinterpret_cast<Scalar*>(shared);
    const long long problem = blockIdx.x, first = problem * n;
    const int band = blockIdx.y * kWarpSize, lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    const int exponent_b = exponents[2 * problem + 1], exponent = exponents[2 * problem] - exponent_b;
    const int code = final_status(outcome[problem], info[problem], generalized != 0, values + first, exponent, n);
    const bool solved = code == kConverged;
    if (blockIdx.y == 0) {
        if (threadIdx.x == 0) status[problem] = code;
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            eigenvalues[first + i] = solved ? ldexp(values[first + i], exponent) : not_a_number<Scalar>();
        }
    }
    for (int start = 0; start < n; start += kWarpSize) {
        for (int j = warp; j < kWarpSize; j += warps) {
            if (start + j < n && band + lane < n) {
                tile[j * (kWarpSize + 1) + lane] = vectors[(first + start + j) * n + band + lane];
            }
        }
        __syncthreads();
        for (int i = warp; i < kWarpSize; i += warps) {
            if (band + i < n && start + lane < n) {
                const Scalar element = ldexp(tile[lane * (kWarpSize + 1) + i], -exponent_b / 2);
                eigenvectors[(first + band + i) * n + start + lane] = solved ? element : not_a_number<Scalar>();
            }
        }
        __syncthreads();
    }
}

}  // namespace sstmerge::device

#define SSTMERGE_EIGH_STAGES(Scalar, name)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4) eigh_prepare_##name(                                          \
        const Scalar* a, long long a_batch_stride, long long a_row_stride, long long a_column_stride, const Scalar* b, \
        long long b_batch_stride, long long b_row_stride, long long b_column_stride, Scalar* reduced, Scalar* factor,  \
        Scalar** reduced_pointers, Scalar** factor_pointers, int* exponents, int* outcome, int n) {                    \
        sstmerge::device::prepare<Scalar>({a, a_batch_stride, a_row_stride, a_column_stride},                          \
                                          {b, b_batch_stride, b_row_stride, b_column_stride}, {reduced, factor, n},    \
                                          reduced_pointers, factor_pointers, exponents, outcome);                      \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        eigh_check_factor_##name(Scalar* reduced, Scalar* factor, const int* info, int* outcome, int n) {              \
        sstmerge::device::check_factor<Scalar>({reduced, factor, n}, info, outcome);                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        eigh_check_reduced_##name(Scalar* reduced, int* outcome, int n) {                                              \
        sstmerge::device::check_reduced<Scalar>({reduced, nullptr, n}, outcome);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) eigh_finish_##name(                                              \
        const Scalar* values, const Scalar* vectors, const int* exponents, const int* info, int generalized,           \
        const int* outcome, Scalar* eigenvalues, Scalar* eigenvectors, int* status, int n) {                           \
        sstmerge::device::finish(values, vectors, exponents, info, generalized, outcome, eigenvalues, eigenvectors,    \
                                 status, n);                                                                           \
    }

SSTMERGE_EIGH_STAGES(float, float32)
SSTMERGE_EIGH_STAGES(double, float64)

#define SSTMERGE_EIGH_STAGES_KERNELS(entry)                                                                  \
    entry(eigh_prepare_float32) entry(eigh_prepare_float64) entry(eigh_check_factor_float32)                 \
        entry(eigh_check_factor_float64) entry(eigh_check_reduced_float32) entry(eigh_check_reduced_float64) \
            entry(eigh_finish_float32) entry(eigh_finish_float64)
