// NVIDIA's dense solvers without its headers and without linking them: cuSOLVER and cuBLAS are opened at run time, so
// that every build has them on a machine that has them. Everything acts on CUDA's current device, which the caller
// chooses, and is put on the stream given; addresses are of memory on that device unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sstmerge::cusolver {

// Opens libcusolver and returns its number. A candidate is a list of files or names of libraries, what libcusolver
// needs first and itself last; the first candidate that can be loaded is taken. Throws std::runtime_error, which names
// everything that was tried, where none can.
int open(const std::vector<std::vector<std::string>>& candidates);

// The file that was opened.
std::string path(int library);

// Whether it has cusolverDnXsyevBatched, as from cuSOLVER 11.7.1 (CUDA 12.6.2).
bool has_syev_batched(int library);

// Where a call goes. Handles belong to a library, a device and a thread: made at the first call, kept for the next.
struct Place {
    int library;
    int device;
    std::uintptr_t stream;
};

// Matrices are n x n, column-major and contiguous; every one has an entry in `info`, which is zero where all is well.
// All functions throw std::invalid_argument for a library that was not opened or sizes below one, and
// std::runtime_error with the name of the status where a call is refused.

// Elements of the workspace that sygvd needs.
template <typename Scalar>
int sygvd_workspace(const Place& place, const Scalar* a, const Scalar* b, const Scalar* eigenvalues, int n);

// One after another: a v = lambda b v from the lower triangles. Overwrites a with the eigenvectors and b with its
// Cholesky factor. `info` is larger than n where b is not positive definite.
template <typename Scalar>
void sygvd(const Place& place, Scalar* a, Scalar* b, Scalar* eigenvalues, Scalar* workspace, int workspace_size,
           int* info, int n, int batch);

// Overwrites the lower triangles of the matrices at the addresses in `matrices` with their Cholesky factors.
template <typename Scalar>
void potrf_batched(const Place& place, Scalar** matrices, int* info, int n, int batch);

enum class Solve {
    kForward,       // X <- L^-1 X
    kFromTheRight,  // X <- X L^-T
    kBackward,      // X <- L^-T X
};

// Solves with lower triangular factors L in the place of the matrices X.
template <typename Scalar>
void trsm_batched(const Place& place, Solve solve, const Scalar* const* factors, Scalar* const* matrices, int n,
                  int batch);

// Bytes of workspace on the device and on the host that syev_batched needs.
template <typename Scalar>
std::pair<std::size_t, std::size_t> syev_batched_workspace(const Place& place, const Scalar* matrices,
                                                           const Scalar* eigenvalues, int n, int batch);

// Overwrites symmetric matrices, of which the lower triangles are read, with their eigenvectors; ascending eigenvalues.
template <typename Scalar>
void syev_batched(const Place& place, Scalar* matrices, Scalar* eigenvalues, void* device_workspace,
                  std::size_t device_bytes, void* host_workspace, std::size_t host_bytes, int* info, int n, int batch);

}  // namespace sstmerge::cusolver
