// Batched symmetric-definite generalized eigenproblems on the CPU: A v = lambda B v, threads over the batch.
#pragma once

#include <cstdint>

namespace sstmerge {

// What became of one problem. sstmerge.reference.SolveStatus has the same codes, and words for them.
enum class SolveStatus : std::int32_t {
    kConverged = 0,
    kNotPositiveDefinite = 1,
    kNotConverged = 2,
    kNonFiniteInput = 3,
};

// `n` x `n` row-major matrices; strides in elements, between matrices and between the rows of one.
template <typename Scalar>
struct MatrixBatch {
    Scalar* data;
    std::int64_t batch_stride;
    std::int64_t row_stride;

    Scalar* row(std::int64_t problem, std::int64_t i) const { return data + problem * batch_stride + i * row_stride; }
};

// Reads the lower triangles of `a` and `b` and writes, per problem, the ascending eigenvalues (batch, n), contiguous,
// the eigenvectors as columns with V^T B V = I, and the status (batch). A problem that fails gets NaN eigenvalues and
// eigenvectors and leaves its neighbours alone. A problem's result depends neither on `num_threads` nor on the others.
// Throws std::invalid_argument for an n whose workspace LAPACK cannot address.
template <typename Scalar>
void generalized_eigh(MatrixBatch<const Scalar> a, MatrixBatch<const Scalar> b, Scalar* eigenvalues,
                      MatrixBatch<Scalar> eigenvectors, std::int32_t* status, std::int64_t batch, int n,
                      int num_threads);

}  // namespace sstmerge
