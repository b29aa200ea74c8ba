// The entry points of cuSOLVER and cuBLAS that are used, as cusolverDn.h and cublas_api.h declare them in CUDA 12 and
// 13. Enumerations and statuses are ints there; handles and streams are pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sstmerge::cusolver {

using Handle = void*;
using Stream = void*;

// cusolver_common.h, cublas_api.h and library_types.h
constexpr int kSuccess = 0;
constexpr int kEigType1 = 1;  // A v = lambda B v
constexpr int kEigModeVector = 1;
constexpr int kFillModeLower = 0;
constexpr int kOperationNone = 0, kOperationTranspose = 1;
constexpr int kSideLeft = 0, kSideRight = 1;
constexpr int kDiagonalNonUnit = 0;
template <typename Scalar>
constexpr int kDataType = sizeof(Scalar) == sizeof(double) ? 1 : 0;  // CUDA_R_64F, CUDA_R_32F

template <typename Scalar>
struct TypedApi {
    int (*sygvd_buffer_size)(Handle, int type, int mode, int fill, int n, const Scalar* a, int lda, const Scalar* b,
                             int ldb, const Scalar* w, int* lwork);
    int (*sygvd)(Handle, int type, int mode, int fill, int n, Scalar* a, int lda, Scalar* b, int ldb, Scalar* w,
                 Scalar* work, int lwork, int* info);
    int (*potrf_batched)(Handle, int fill, int n, Scalar** a, int lda, int* info, int batch);
    int (*trsm_batched)(Handle, int side, int fill, int operation, int diagonal, int m, int n, const Scalar* alpha,
                        const Scalar* const* a, int lda, Scalar* const* b, int ldb, int batch);
};

struct Api {
    int (*create)(Handle*);
    int (*destroy)(Handle);
    int (*set_stream)(Handle, Stream);
    int (*create_parameters)(Handle*);
    int (*destroy_parameters)(Handle);
    int (*blas_create)(Handle*);
    int (*blas_set_stream)(Handle, Stream);
    // Null before CUDA 12.6.2.
    int (*syev_batched_buffer_size)(Handle, Handle parameters, int mode, int fill, std::int64_t n, int type_a,
                                    const void* a, std::int64_t lda, int type_w, const void* w, int type_computed,
                                    std::size_t* device_bytes, std::size_t* host_bytes, std::int64_t batch);
    int (*syev_batched)(Handle, Handle parameters, int mode, int fill, std::int64_t n, int type_a, void* a,
                        std::int64_t lda, int type_w, void* w, int type_computed, void* device_workspace,
                        std::size_t device_bytes, void* host_workspace, std::size_t host_bytes, int* info,
                        std::int64_t batch);
    TypedApi<float> float32;
    TypedApi<double> float64;
    std::string path;
};

// Loads one candidate: what libcusolver needs first, itself last. Where that fails, `api` is left alone and the reason
// is returned; otherwise an empty string.
std::string load(const std::vector<std::string>& candidate, Api& api);

// The name of a status, of cuSOLVER or of cuBLAS, which number them differently.
std::string solver_status(int status);
std::string blas_status(int status);

}  // namespace sstmerge::cusolver
