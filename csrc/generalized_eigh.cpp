#include "generalized_eigh.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "lapack.h"

namespace sstmerge {
namespace {

// LAPACK counts the 2 n^2 + 6 n + 1 elements of its workspace in a 32-bit int.
constexpr int kMaxSize = 32000;

// The OpenBLAS in scipy's wheels is built for this many threads; beyond it, it complains on the standard error.
constexpr std::int64_t kMaxThreads = 64;

// Everything one thread needs, allocated once: sygvd overwrites both matrices, the first with the eigenvectors.
template <typename Scalar>
struct Scratch {
    explicit Scratch(int n)
        : a(static_cast<std::size_t>(n) * n),
          b(static_cast<std::size_t>(n) * n),
          work(1 + 6 * static_cast<std::size_t>(n) + 2 * static_cast<std::size_t>(n) * n),
          integer_work(3 + 5 * static_cast<std::size_t>(n)) {}

    std::vector<Scalar> a, b, work;
    std::vector<int> integer_work;
};

// Copies the lower triangle, from rows to LAPACK's columns. False if not all of it is finite.
template <typename Scalar>
bool copy_triangle(const MatrixBatch<const Scalar>& source, std::int64_t problem, int n, std::vector<Scalar>& target) {
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        const Scalar* row = source.row(problem, i);
        for (int j = 0; j <= i; ++j) {
            finite &= std::isfinite(row[j]);
            target[static_cast<std::size_t>(j) * n + i] = row[j];
        }
    }
    return finite;
}

template <typename Scalar>
SolveStatus solve(SygvdFunction<Scalar> sygvd, Scratch<Scalar>& scratch, Scalar* eigenvalues, int n) {
    int itype = 1, info = 0;
    int work_size = static_cast<int>(scratch.work.size());
    int integer_work_size = static_cast<int>(scratch.integer_work.size());
    // The same bits transposed would do as an upper triangle without the transposition, but OpenBLAS is slower on
    // those.
    char vectors = 'V', lower = 'L';
    sygvd(&itype, &vectors, &lower, &n, scratch.a.data(), &n, scratch.b.data(), &n, eigenvalues, scratch.work.data(),
          &work_size, scratch.integer_work.data(), &integer_work_size, &info);
    if (info > n) return SolveStatus::kNotPositiveDefinite;
    // Finite input may still overflow on the way (a tiny B under a large A): that is no solution either.
    const bool finite = std::all_of(eigenvalues, eigenvalues + n, [](Scalar value) { return std::isfinite(value); });
    return info == 0 && finite ? SolveStatus::kConverged : SolveStatus::kNotConverged;
}

// LAPACK leaves each eigenvector in n consecutive elements; the caller gets them as the columns of a row-major matrix.
template <typename Scalar>
void write_eigenvectors(const std::vector<Scalar>& source, const MatrixBatch<Scalar>& target, std::int64_t problem,
                        int n) {
    for (int i = 0; i < n; ++i) {
        Scalar* row = target.row(problem, i);
        for (int j = 0; j < n; ++j) row[j] = source[static_cast<std::size_t>(j) * n + i];
    }
}

}  // namespace

template <typename Scalar>
void generalized_eigh(MatrixBatch<const Scalar> a, MatrixBatch<const Scalar> b, Scalar* eigenvalues,
                      MatrixBatch<Scalar> eigenvectors, std::int32_t* status, std::int64_t batch, int n,
                      int num_threads) {
    if (n > kMaxSize) {
        throw std::invalid_argument("matrices of size " + std::to_string(n) + " are too large: LAPACK takes at most " +
                                    std::to_string(kMaxSize));
    }
    if (batch == 0 || n == 0) return;
    const SygvdFunction<Scalar> sygvd = sstmerge::sygvd<Scalar>();
    const int threads = static_cast<int>(std::clamp<std::int64_t>(num_threads, 1, std::min(batch, kMaxThreads)));
    // Allocated before the parallel region, out of which an exception could not travel.
    std::vector<Scratch<Scalar>> scratches(threads, Scratch<Scalar>(n));
    const SingleThreadedBlas single_threaded_blas;

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t problem = 0; problem < batch; ++problem) {
#ifdef _OPENMP
        Scratch<Scalar>& scratch = scratches[omp_get_thread_num()];
#else
        Scratch<Scalar>& scratch = scratches[0];
#endif
        Scalar* values = eigenvalues + problem * n;
        const bool a_is_finite = copy_triangle(a, problem, n, scratch.a);
        const bool b_is_finite = copy_triangle(b, problem, n, scratch.b);
        const SolveStatus result =
            a_is_finite && b_is_finite ? solve(sygvd, scratch, values, n) : SolveStatus::kNonFiniteInput;
        if (result != SolveStatus::kConverged) {
            const Scalar nan = std::numeric_limits<Scalar>::quiet_NaN();
            std::fill_n(values, n, nan);
            std::fill(scratch.a.begin(), scratch.a.end(), nan);
        }
        write_eigenvectors(scratch.a, eigenvectors, problem, n);
        status[problem] = static_cast<std::int32_t>(result);
    }
}

template void generalized_eigh<float>(MatrixBatch<const float>, MatrixBatch<const float>, float*, MatrixBatch<float>,
                                      std::int32_t*, std::int64_t, int, int);
template void generalized_eigh<double>(MatrixBatch<const double>, MatrixBatch<const double>, double*,
                                       MatrixBatch<double>, std::int32_t*, std::int64_t, int, int);

}  // namespace sstmerge
