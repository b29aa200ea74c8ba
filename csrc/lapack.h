// LAPACK without shipping or linking one: the routines are those that scipy carries, handed over as function pointers.
#pragma once

#include <mutex>
#include <string>

namespace sstmerge {

// Fortran ssygvd / dsygvd: A v = lambda B v for symmetric A and positive definite B, by divide and conquer.
template <typename Scalar>
using SygvdFunction = void (*)(int* itype, char* jobz, char* uplo, int* n, Scalar* a, int* lda, Scalar* b, int* ldb,
                               Scalar* w, Scalar* work, int* lwork, int* iwork, int* liwork, int* info);

// Takes over scipy's sygvd for this scalar type. `signature` is the C signature that scipy gives with the pointer;
// throws std::invalid_argument where it is not the one above (a 64-bit-integer LAPACK would corrupt memory).
template <typename Scalar>
void bind_sygvd(void* function, const std::string& signature);

// The routine taken over; throws std::logic_error before bind_sygvd.
template <typename Scalar>
SygvdFunction<Scalar> sygvd();

// While one lives, scipy's OpenBLAS uses one thread per call, because our threads run over the batch. The setting is
// global to the process in OpenBLAS's pthread builds, so the guards of several callers take turns.
class SingleThreadedBlas {
  public:
    SingleThreadedBlas();
    ~SingleThreadedBlas();
    SingleThreadedBlas(const SingleThreadedBlas&) = delete;
    SingleThreadedBlas& operator=(const SingleThreadedBlas&) = delete;

  private:
    std::lock_guard<std::mutex> turn_;
    int previous_ = 0;
};

}  // namespace sstmerge
