// a v = lambda b v for a batch of small problems in one launch, one block per problem and everything in shared memory:
// b = L L^T, A = L^-1 a L^-T, A = Q diag(lambda) Q^T by parallel cyclic Jacobi rotations, V = L^-T Q, ascending order.
#pragma once

#include "eigh_input.cuh"
#include "primitives.cuh"

namespace sstmerge::device {

// Half a unit in the last place of 1.
template <typename Scalar>
__device__ __forceinline__ Scalar rounding_error();
template <>
__device__ __forceinline__ float rounding_error<float>() {
    return 5.9604644775390625e-8f;
}
template <>
__device__ __forceinline__ double rounding_error<double>() {
    return 1.1102230246251565e-16;
}

// The two matrices of a problem in one rectangle of n rows and n + 1 columns: the symmetric one in the lower triangle,
// the triangular factor, transposed, in what lies above.
template <typename Scalar>
struct Triangles {
    Scalar* data;
    int n;

    __device__ __forceinline__ Scalar& symmetric(int i, int j) const {
        return i > j ? data[i * (n + 1) + j] : data[j * (n + 1) + i];
    }
    // L(i, k) for i >= k.
    __device__ __forceinline__ Scalar& factor(int i, int k) const { return data[k * (n + 1) + i + 1]; }
};

// A thread's place among the warps and lanes of its block: loops over matrices give rows to warps, columns to lanes.
struct Place {
    int lane, warp, warps;
};

template <typename Scalar>
struct Problem {
    Triangles<Scalar> triangles;
    Scalar* square;            // n x n with rows of n + 1: the reduction, then the eigenvectors, as rows
    Scalar* inverse_diagonal;  // 1 / L(k, k)
    Scalar* rotations;         // n / 2 sines and as many tangents of half the angle; at the end the eigenvalues' ranks
    Scalar* partial;           // for block_maximum
    int n;
    Place place;

    __device__ __forceinline__ Scalar& at(int i, int j) const { return square[i * (n + 1) + j]; }
};

// Replaces b, which is in the place of the factor, by its Cholesky factor. False if it is not positive definite.
template <typename Scalar>
__device__ __forceinline__ bool factorize(const Problem<Scalar>& problem) {
    const Triangles<Scalar>& triangles = problem.triangles;
    Scalar* const inverse_diagonal = problem.inverse_diagonal;
    const Place place = problem.place;
    const int n = problem.n;
    for (int k = 0; k < n; ++k) {
        // Column k stays unscaled until the end, so that one barrier per column is enough.
        const Scalar pivot = triangles.factor(k, k);
        if (!(pivot > 0)) return false;
        for (int j = k + 1 + place.warp; j < n; j += place.warps) {
            const Scalar multiplier = triangles.factor(j, k) / pivot;
            for (int i = j + place.lane; i < n; i += kWarpSize) {
                triangles.factor(i, j) -= triangles.factor(i, k) * multiplier;
            }
        }
        __syncthreads();
    }
    for (int k = threadIdx.x; k < n; k += blockDim.x) inverse_diagonal[k] = 1 / sqrt(triangles.factor(k, k));
    __syncthreads();
    for (int k = place.warp; k < n; k += place.warps) {
        for (int i = k + place.lane; i < n; i += kWarpSize) triangles.factor(i, k) *= inverse_diagonal[k];
    }
    __syncthreads();
    return true;
}

// Solves with the factor in the place of the square matrix X, whose element (i, j) is at i * row_stride + j *
// column_stride: X <- L^-1 X, or L^-T X. Row k stays unscaled until the end: one barrier per row is enough.
template <bool kTransposed, typename Scalar>
__device__ __forceinline__ void solve_triangular(const Problem<Scalar>& problem, int row_stride, int column_stride) {
    const Triangles<Scalar>& triangles = problem.triangles;
    Scalar* const square = problem.square;
    Scalar* const inverse_diagonal = problem.inverse_diagonal;
    const Place place = problem.place;
    const int n = problem.n;
    for (int step = 0; step < n; ++step) {
        const int k = kTransposed ? n - 1 - step : step;
        const int first = kTransposed ? 0 : k + 1, last = kTransposed ? k : n;
        for (int i = first + place.warp; i < last; i += place.warps) {
            const Scalar entry = kTransposed ? triangles.factor(k, i) : triangles.factor(i, k);
            const Scalar multiplier = entry * inverse_diagonal[k];
            for (int j = place.lane; j < n; j += kWarpSize) {
                square[i * row_stride + j * column_stride] -= multiplier * square[k * row_stride + j * column_stride];
            }
        }
        __syncthreads();
    }
    for (int k = place.warp; k < n; k += place.warps) {
        for (int j = place.lane; j < n; j += kWarpSize) {
            square[k * row_stride + j * column_stride] *= inverse_diagonal[k];
        }
    }
    __syncthreads();
}

// The pair `number` of n / 2 disjoint pairs p < q in one round of a tournament in which, over n - 1 rounds, everybody
// meets everybody. n is even.
struct Pair {
    int p, q;
};
__device__ __forceinline__ Pair tournament_pair(int round, int number, int n) {
    int one = round + number, other = number == 0 ? n - 1 : round - number;
    if (one >= n - 1) one -= n - 1;
    if (other < 0) other += n - 1;
    return one < other ? Pair{one, other} : Pair{other, one};
}

// One round of rotations: every pair's angle, with the 2 x 2 block on the diagonal that it makes diagonal. True if this
// thread has found a block that was not diagonal yet, relative to its own diagonal or to the whole matrix, whose
// largest element is about 1: the square of a rounding error of it is nothing, and keeps the tangents from overflowing.
template <typename Scalar>
__device__ __forceinline__ bool find_rotations(const Problem<Scalar>& problem, int round) {
    const Triangles<Scalar>& triangles = problem.triangles;
    Scalar* const rotations = problem.rotations;
    const int n = problem.n;
    constexpr Scalar kNegligible = 4;
    const Scalar unit = kNegligible * rounding_error<Scalar>();
    const int pairs = n / 2;
    bool rotated = false;
    for (int number = threadIdx.x; number < pairs; number += blockDim.x) {
        const auto [p, q] = tournament_pair(round, number, n);
        const Scalar pp = triangles.symmetric(p, p), qq = triangles.symmetric(q, q), pq = triangles.symmetric(p, q);
        Scalar sine = 0, half_tangent = 0;
        if (fabs(pq) > unit * fmax(sqrt(fabs(pp)) * sqrt(fabs(qq)), unit)) {
            // Of twice the angle; of its two solutions the smaller angle.
            const Scalar cotangent = (qq - pp) / (2 * pq);
            Scalar tangent = 1 / (fabs(cotangent) + sqrt(1 + cotangent * cotangent));
            if (cotangent < 0) tangent = -tangent;
            const Scalar cosine = 1 / sqrt(1 + tangent * tangent);
            sine = tangent * cosine;
            half_tangent = sine / (1 + cosine);
            triangles.symmetric(p, p) = pp - tangent * pq;
            triangles.symmetric(q, q) = qq + tangent * pq;
            triangles.symmetric(p, q) = 0;
            rotated = true;
        }
        rotations[number] = sine;
        rotations[pairs + number] = half_tangent;
    }
    return rotated;
}

// (x, y) <- (cos x - sin y, sin x + cos y) with cos = 1 - sin tan(angle / 2): rounding errors are those of the angle,
// so that the many small rotations of the last sweeps cost no orthogonality.
template <typename Scalar>
__device__ __forceinline__ void rotate(Scalar& x, Scalar& y, Scalar sine, Scalar half_tangent) {
    const Scalar old_x = x;
    x -= sine * (y + half_tangent * x);
    y += sine * (old_x - half_tangent * y);
}

// Applies the round's rotations from both sides: each 2 x 2 block of two different pairs is one thread's.
template <typename Scalar>
__device__ __forceinline__ void rotate_symmetric(const Problem<Scalar>& problem, int round) {
    const Triangles<Scalar>& triangles = problem.triangles;
    Scalar* const rotations = problem.rotations;
    const int n = problem.n;
    const int pairs = n / 2, odd = pairs & 1;
    // The strict lower triangle of pairs x pairs, folded into a rectangle: row r, then what is left of it holds row
    // width - r.
    const int width = pairs - 1 + odd, count = pairs / 2 * width;
    for (int element = threadIdx.x; element < count; element += blockDim.x) {
        const int r = element / width + odd, column = element % width;
        const int first = column < r ? r : width - r, second = column < r ? column : column - r;
        const auto [p1, q1] = tournament_pair(round, first, n);
        const auto [p2, q2] = tournament_pair(round, second, n);
        const Scalar sine1 = rotations[first], half_tangent1 = rotations[pairs + first];
        const Scalar sine2 = rotations[second], half_tangent2 = rotations[pairs + second];
        Scalar &pp = triangles.symmetric(p1, p2), &pq = triangles.symmetric(p1, q2);
        Scalar &qp = triangles.symmetric(q1, p2), &qq = triangles.symmetric(q1, q2);
        Scalar elements[4] = {pp, pq, qp, qq};
        rotate(elements[0], elements[2], sine1, half_tangent1);
        rotate(elements[1], elements[3], sine1, half_tangent1);
        rotate(elements[0], elements[1], sine2, half_tangent2);
        rotate(elements[2], elements[3], sine2, half_tangent2);
        pp = elements[0];
        pq = elements[1];
        qp = elements[2];
        qq = elements[3];
    }
}

// Applies the round's rotations to the eigenvectors, which are the rows of the square matrix.
template <typename Scalar>
__device__ __forceinline__ void rotate_eigenvectors(const Problem<Scalar>& problem, int round) {
    Scalar* const rotations = problem.rotations;
    const Place place = problem.place;
    const int n = problem.n;
    const int pairs = n / 2;
    for (int number = place.warp; number < pairs; number += place.warps) {
        const auto [p, q] = tournament_pair(round, number, n);
        const Scalar sine = rotations[number], half_tangent = rotations[pairs + number];
        for (int j = place.lane; j < n; j += kWarpSize) {
            Scalar x = problem.at(p, j), y = problem.at(q, j);
            rotate(x, y, sine, half_tangent);
            problem.at(p, j) = x;
            problem.at(q, j) = y;
        }
    }
}

// Diagonalises the symmetric matrix and leaves its eigenvectors as rows of the square matrix. False if a rotation was
// still needed after `maximal_sweeps`.
template <typename Scalar>
__device__ __forceinline__ bool diagonalize(const Problem<Scalar>& problem, int maximal_sweeps) {
    for (int sweep = 0; sweep < maximal_sweeps; ++sweep) {
        bool rotated = false;
        for (int round = 0; round < problem.n - 1; ++round) {
            rotated = find_rotations(problem, round) || rotated;
            __syncthreads();
            rotate_symmetric(problem, round);
            rotate_eigenvectors(problem, round);
            __syncthreads();
        }
        if (!__syncthreads_or(rotated)) return true;
    }
    return false;
}

// Brings A = L^-1 a L^-T from the square into the place of the symmetric matrix, divided by 2^exponent to a largest
// element of about 1, and the identity into the square. False if A has overflowed.
template <typename Scalar>
__device__ __forceinline__ bool take_reduced(const Problem<Scalar>& problem, int& exponent) {
    const Triangles<Scalar>& triangles = problem.triangles;
    const Place place = problem.place;
    const int n = problem.n;
    Scalar largest = 0;
    bool finite = true;
    for (int i = place.warp; i < n; i += place.warps) {
        for (int j = place.lane; j <= i; j += kWarpSize) {
            // The two triangular solves round differently on the two sides of the diagonal.
            const Scalar mean = problem.at(i, j) / 2 + problem.at(j, i) / 2;
            triangles.symmetric(i, j) = mean;
            finite = finite && isfinite(mean);
            largest = fmax(largest, fabs(mean));
        }
    }
    if (__syncthreads_or(!finite)) return false;
    exponent = exponent_of(block_maximum(largest, problem.partial));
    for (int i = place.warp; i < n; i += place.warps) {
        for (int j = place.lane; j < n; j += kWarpSize) {
            if (j <= i) triangles.symmetric(i, j) = ldexp(triangles.symmetric(i, j), -exponent);
            problem.at(i, j) = i == j ? 1 : 0;
        }
    }
    __syncthreads();
    return true;
}

// Solves one problem in shared memory and returns its status. The eigenvalues are left on the diagonal of the symmetric
// matrix, to be multiplied by 2^exponent; the eigenvectors are the rows of the square. n is even.
template <typename Scalar>
__device__ __forceinline__ int solve(const Problem<Scalar>& problem, int maximal_sweeps, int& exponent) {
    const int stride = problem.n + 1;
    if (!factorize(problem)) return kNotPositiveDefinite;
    solve_triangular<false>(problem, stride, 1);  // L^-1 a
    solve_triangular<false>(problem, 1, stride);  // and, on its transpose, L^-1 (L^-1 a)^T
    if (!take_reduced(problem, exponent)) return kNotConverged;
    if (!diagonalize(problem, maximal_sweeps)) return kNotConverged;
    solve_triangular<true>(problem, 1, stride);  // L^-T times the eigenvectors, which are the rows
    return kConverged;
}

// Loads a problem of size n, divided by its powers of two, into one of even size: an odd n gets a row and column of its
// own, decoupled from the rest, whose eigenvalue is left out at the end.
template <typename Scalar>
__device__ __forceinline__ void load(const Problem<Scalar>& problem, const SymmetricBatch<Scalar>& a,
                                     const SymmetricBatch<Scalar>& b, int n, const Exponents& exponents) {
    const Place place = problem.place;
    for (int i = place.warp; i < problem.n; i += place.warps) {
        for (int j = place.lane; j < problem.n; j += kWarpSize) {
            const bool inside = i < n && j < n;
            problem.at(i, j) = inside ? ldexp(a.at(blockIdx.x, i, j), -exponents.a) : 0;
            if (i < j) continue;
            const Scalar padding = i == j ? 1 : 0;
            problem.triangles.factor(i, j) = inside ? ldexp(b.at(blockIdx.x, i, j), -exponents.b) : padding;
        }
    }
    __syncthreads();
}

// Writes the solution in ascending order, or NaN, and returns the status in the end.
template <typename Scalar>
__device__ __forceinline__ int store(const Problem<Scalar>& problem, int status, int value_exponent,
                                     int vector_exponent, Scalar* eigenvalues, Scalar* eigenvectors, int n) {
    const Place place = problem.place;
    const long long first = static_cast<long long>(blockIdx.x) * n;
    int* ranks = reinterpret_cast<int*>(problem.rotations);
    bool finite = true;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        int rank = i;
        Scalar value = not_a_number<Scalar>();
        if (status == kConverged) {
            const Scalar unscaled = problem.triangles.symmetric(i, i);
            rank = 0;
            for (int j = 0; j < n; ++j) {
                const Scalar other = problem.triangles.symmetric(j, j);
                rank += other < unscaled || (other == unscaled && j < i);
            }
            value = ldexp(unscaled, value_exponent);
            finite = isfinite(value);
        }
        ranks[i] = rank;
        eigenvalues[first + rank] = value;
    }
    // A problem of finite numbers may have a solution that is not.
    if (__syncthreads_or(!finite)) {
        status = kNotConverged;
        for (int i = threadIdx.x; i < n; i += blockDim.x) eigenvalues[first + i] = not_a_number<Scalar>();
    }
    for (int i = place.warp; i < n; i += place.warps) {
        for (int j = place.lane; j < n; j += kWarpSize) {
            eigenvectors[(first + i) * n + ranks[j]] =
                status == kConverged ? ldexp(problem.at(j, i), vector_exponent) : not_a_number<Scalar>();
        }
    }
    return status;
}

// One block per problem, of whole warps. Shared memory: m = n rounded up to an even number, 2 m (m + 1) + 2 m + 32
// elements. Eigenvalues (batch, n) and eigenvectors (batch, n, n), as columns, are contiguous.
template <typename Scalar>
__device__ __forceinline__ void jacobi_eigh(const SymmetricBatch<Scalar>& a, const SymmetricBatch<Scalar>& b,
                                            Scalar* __restrict__ eigenvalues, Scalar* __restrict__ eigenvectors,
                                            int* __restrict__ status, int n, int maximal_sweeps) {
    SSTMERGE_SHARED_MEMORY(shared);
    const int even = n + (n & 1), rectangle = even * (even + 1);
    const int thread = threadIdx.x, threads = blockDim.x;
    Scalar* memory = reinterpret_cast<Scalar*>(shared);
    const Problem<Scalar> problem{{memory, even},
                                  memory + rectangle,
                                  memory + 2 * rectangle,
                                  memory + 2 * rectangle + even,
                                  memory + 2 * rectangle + 2 * even,
                                  even,
                                  {thread % kWarpSize, thread / kWarpSize, threads / kWarpSize}};
    const Exponents exponents = find_exponents(a, b, blockIdx.x, n, problem.partial);
    int code = kNonFiniteInput, exponent = 0;
    if (exponents.finite) {
        load(problem, a, b, n, exponents);
        code = solve(problem, maximal_sweeps, exponent);
    }
    code = store(problem, code, exponent + exponents.a - exponents.b, -exponents.b / 2, eigenvalues, eigenvectors, n);
    if (thread == 0) status[blockIdx.x] = code;
}

}  // namespace sstmerge::device

extern "C" __global__ void __launch_bounds__(256, 2)
    jacobi_eigh_float32(const float* a, long long a_batch_stride, long long a_row_stride, long long a_column_stride,
                        const float* b, long long b_batch_stride, long long b_row_stride, long long b_column_stride,
                        float* eigenvalues, float* eigenvectors, int* status, int n, int maximal_sweeps) {
    sstmerge::device::jacobi_eigh<float>({a, a_batch_stride, a_row_stride, a_column_stride},
                                         {b, b_batch_stride, b_row_stride, b_column_stride}, eigenvalues, eigenvectors,
                                         status, n, maximal_sweeps);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    jacobi_eigh_float64(const double* a, long long a_batch_stride, long long a_row_stride, long long a_column_stride,
                        const double* b, long long b_batch_stride, long long b_row_stride, long long b_column_stride,
                        double* eigenvalues, double* eigenvectors, int* status, int n, int maximal_sweeps) {
    sstmerge::device::jacobi_eigh<double>({a, a_batch_stride, a_row_stride, a_column_stride},
                                          {b, b_batch_stride, b_row_stride, b_column_stride}, eigenvalues, eigenvectors,
                                          status, n, maximal_sweeps);
}

#define SSTMERGE_JACOBI_EIGH_KERNELS(entry) entry(jacobi_eigh_float32) entry(jacobi_eigh_float64)
