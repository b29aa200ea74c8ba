// The entry points of cuSOLVER and cuBLAS that sstmerge calls, on host memory and with simple loops, after NVIDIA's
// documentation: column-major, the triangle asked for, info codes, refusal of wrong arguments. What the real ones leave
// undefined is NaN or garbage here, so that nobody relies on it. Compiled with -DOLD it lacks XsyevBatched.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 3, kBlasInvalidValue = 7;
constexpr int kLower = 0, kType1 = 1, kVector = 1;

struct Handle {
    bool blas;
    void* stream = nullptr;
};

std::atomic<int> handles_created{0}, syev_batched_calls{0}, refuse_solver_handles{0};

template <typename Scalar>
constexpr Scalar kNan = std::numeric_limits<Scalar>::quiet_NaN();

bool is_handle(void* handle, bool blas) { return handle != nullptr && static_cast<Handle*>(handle)->blas == blas; }

// The factor of the lower triangle; the upper one is not touched. Returns 0, or the order of the first bad minor.
template <typename Scalar>
int potrf(Scalar* a, int n) {
    for (int k = 0; k < n; ++k) {
        if (!(a[k + k * n] > 0)) {
            a[k + k * n] = kNan<Scalar>;  // a half-finished factor is of no use
            return k + 1;
        }
        const Scalar pivot = a[k + k * n] = std::sqrt(a[k + k * n]);
        for (int i = k + 1; i < n; ++i) a[i + k * n] /= pivot;
        for (int j = k + 1; j < n; ++j) {
            for (int i = j; i < n; ++i) a[i + j * n] -= a[i + k * n] * a[j + k * n];
        }
    }
    return 0;
}

// x <- L^-1 x or L^-T x for one vector with a stride.
template <typename Scalar>
void solve_vector(const Scalar* l, int lda, bool transposed, Scalar* x, int stride, int n) {
    for (int step = 0; step < n; ++step) {
        const int i = transposed ? n - 1 - step : step;
        Scalar sum = x[i * stride];
        for (int k = transposed ? i + 1 : 0; k < (transposed ? n : i); ++k) {
            sum -= (transposed ? l[k + i * lda] : l[i + k * lda]) * x[k * stride];
        }
        x[i * stride] = sum / l[i + i * lda];
    }
}

// Side left: columns of B (m x n) by op(L)^-1. Side right: B op(L)^-1, that is rows by op(L)^-T.
template <typename Scalar>
void trsm(int side, int operation, int m, int n, const Scalar* l, int lda, Scalar* b, int ldb) {
    if (side == 0) {
        for (int j = 0; j < n; ++j) solve_vector(l, lda, operation == 1, b + j * ldb, 1, m);
    } else {
        for (int i = 0; i < m; ++i) solve_vector(l, lda, operation == 0, b + i, ldb, n);
    }
}

// Rotates until it is diagonal. Returns 0, or a number of elements that did not become zero.
template <typename Scalar>
int syev(Scalar* a, Scalar* w, int n) {
    std::vector<double> s(n * n), v(n * n, 0.0);
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < n; ++i) s[i + j * n] = i >= j ? a[i + j * n] : a[j + i * n];
        v[j + j * n] = 1;
    }
    double norm = 0;
    for (double x : s) norm = std::max(norm, std::fabs(x));
    if (!std::isfinite(norm)) return n + 1;
    for (int sweep = 0; sweep < 60; ++sweep) {
        for (int p = 0; p < n; ++p) {
            for (int q = p + 1; q < n; ++q) {
                if (std::fabs(s[p + q * n]) <= 1e-17 * norm) continue;
                const double angle = 0.5 * std::atan2(2 * s[p + q * n], s[q + q * n] - s[p + p * n]);
                const double c = std::cos(angle), t = std::sin(angle);
                for (int k = 0; k < n; ++k) {
                    const double x = s[k + p * n], y = s[k + q * n], g = v[k + p * n], h = v[k + q * n];
                    s[k + p * n] = c * x - t * y;
                    s[k + q * n] = t * x + c * y;
                    v[k + p * n] = c * g - t * h;
                    v[k + q * n] = t * g + c * h;
                }
                for (int k = 0; k < n; ++k) {
                    const double x = s[p + k * n], y = s[q + k * n];
                    s[p + k * n] = c * x - t * y;
                    s[q + k * n] = t * x + c * y;
                }
            }
        }
    }
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return s[i + i * n] < s[j + j * n]; });
    for (int j = 0; j < n; ++j) {
        w[j] = static_cast<Scalar>(s[order[j] + order[j] * n]);
        for (int i = 0; i < n; ++i) a[i + j * n] = static_cast<Scalar>(v[i + order[j] * n]);
    }
    return 0;
}

template <typename Scalar>
int sygvd(void* handle, int type, int mode, int fill, int n, Scalar* a, int lda, Scalar* b, int ldb, Scalar* w,
          Scalar* work, int lwork, int* info) {
    if (!is_handle(handle, false) || type != kType1 || mode != kVector || fill != kLower || lda != n || ldb != n ||
        lwork < 3 * n + 7) {
        return kInvalidValue;
    }
    std::fill(work, work + lwork, kNan<Scalar>);
    const int minor = potrf(b, n);
    *info = minor == 0 ? 0 : n + minor;
    if (minor != 0) {
        std::fill(w, w + n, kNan<Scalar>);
        return kSuccess;
    }
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < j; ++i) a[i + j * n] = a[j + i * n];
    }
    trsm(0, 0, n, n, b, n, a, n);
    trsm(1, 1, n, n, b, n, a, n);
    *info = syev(a, w, n);
    if (*info > n) *info = n;
    trsm(0, 1, n, n, b, n, a, n);
    return kSuccess;
}

template <typename Scalar>
int potrf_batched(void* handle, int fill, int n, Scalar** a, int lda, int* info, int batch) {
    if (!is_handle(handle, false) || fill != kLower || lda != n || batch < 1) return kInvalidValue;
    for (int problem = 0; problem < batch; ++problem) {
        info[problem] = potrf(a[problem], n);
        for (int j = 0; j < n; ++j) {
            for (int i = 0; i < j; ++i) a[problem][i + j * n] = kNan<Scalar>;  // not part of the answer
        }
    }
    return kSuccess;
}

template <typename Scalar>
int trsm_batched(void* handle, int side, int fill, int operation, int diagonal, int m, int n, const Scalar* alpha,
                 const Scalar* const* a, int lda, Scalar* const* b, int ldb, int batch) {
    if (!is_handle(handle, true) || side < 0 || side > 1 || fill != kLower || operation < 0 || operation > 1 ||
        diagonal != 0 || *alpha != 1 || lda < (side == 0 ? m : n) || ldb < m || batch < 1) {
        return kBlasInvalidValue;
    }
    for (int problem = 0; problem < batch; ++problem) trsm(side, operation, m, n, a[problem], lda, b[problem], ldb);
    return kSuccess;
}

template <typename Scalar>
void syev_batched(Scalar* a, Scalar* w, int* info, std::int64_t n, std::int64_t batch) {
    for (std::int64_t problem = 0; problem < batch; ++problem) {
        info[problem] = syev(a + problem * n * n, w + problem * n, static_cast<int>(n));
    }
}

// As cuSOLVER 12: an odd number of bytes on the device, and some on the host.
[[maybe_unused]] std::size_t device_workspace(std::int64_t n, std::int64_t batch) { return 13 + 8 * n * batch; }
[[maybe_unused]] std::size_t host_workspace(std::int64_t batch) { return 5 + batch; }

[[maybe_unused]] bool is_valid_batch(void* handle, void* parameters, int mode, int fill, std::int64_t n,
                                     std::int64_t lda, int type_a, int type_w, int computed, std::int64_t batch) {
    return is_handle(handle, false) && parameters != nullptr && mode == kVector && fill == kLower && lda == n &&
           type_a == type_w && type_w == computed && (type_a == 0 || type_a == 1) && batch > 0 &&
           n * lda * batch <= std::numeric_limits<std::int32_t>::max();
}

}  // namespace

extern "C" {

int fake_handles_created() { return handles_created; }
int fake_syev_batched_calls() { return syev_batched_calls; }
void fake_refuse_solver_handles(int refuse) { refuse_solver_handles = refuse; }

int cusolverDnCreate(void** handle) {
    if (refuse_solver_handles) return 1;
    ++handles_created;
    *handle = new Handle{false};
    return kSuccess;
}
int cusolverDnDestroy(void* handle) {
    delete static_cast<Handle*>(handle);
    return kSuccess;
}
int cusolverDnSetStream(void* handle, void* stream) {
    if (!is_handle(handle, false)) return 1;
    static_cast<Handle*>(handle)->stream = stream;
    return kSuccess;
}
int cusolverDnCreateParams(void** parameters) {
    *parameters = new Handle{false};
    return kSuccess;
}
int cusolverDnDestroyParams(void* parameters) { return cusolverDnDestroy(parameters); }
int cublasCreate_v2(void** handle) {
    *handle = new Handle{true};
    return kSuccess;
}
int cublasSetStream_v2(void* handle, void* stream) {
    if (!is_handle(handle, true)) return 1;
    static_cast<Handle*>(handle)->stream = stream;
    return kSuccess;
}

#define FAKE_TYPED(letter, Scalar)                                                                                   \
    int cusolverDn##letter##sygvd_bufferSize(void* handle, int, int, int, int n, const Scalar*, int, const Scalar*,  \
                                             int, const Scalar*, int* lwork) {                                       \
        *lwork = 3 * n + 7;                                                                                          \
        return is_handle(handle, false) ? kSuccess : kInvalidValue;                                                  \
    }                                                                                                                \
    int cusolverDn##letter##sygvd(void* handle, int type, int mode, int fill, int n, Scalar* a, int lda, Scalar* b,  \
                                  int ldb, Scalar* w, Scalar* work, int lwork, int* info) {                          \
        return sygvd(handle, type, mode, fill, n, a, lda, b, ldb, w, work, lwork, info);                             \
    }                                                                                                                \
    int cusolverDn##letter##potrfBatched(void* handle, int fill, int n, Scalar** a, int lda, int* info, int batch) { \
        return potrf_batched(handle, fill, n, a, lda, info, batch);                                                  \
    }                                                                                                                \
    int cublas##letter##trsmBatched(void* handle, int side, int fill, int operation, int diagonal, int m, int n,     \
                                    const Scalar* alpha, const Scalar* const* a, int lda, Scalar* const* b, int ldb, \
                                    int batch) {                                                                     \
        return trsm_batched(handle, side, fill, operation, diagonal, m, n, alpha, a, lda, b, ldb, batch);            \
    }
FAKE_TYPED(S, float)
FAKE_TYPED(D, double)

#ifndef OLD
int cusolverDnXsyevBatched_bufferSize(void* handle, void* parameters, int mode, int fill, std::int64_t n, int type_a,
                                      const void*, std::int64_t lda, int type_w, const void*, int computed,
                                      std::size_t* device_bytes, std::size_t* host_bytes, std::int64_t batch) {
    if (!is_valid_batch(handle, parameters, mode, fill, n, lda, type_a, type_w, computed, batch)) return kInvalidValue;
    *device_bytes = device_workspace(n, batch);
    *host_bytes = host_workspace(batch);
    return kSuccess;
}
int cusolverDnXsyevBatched(void* handle, void* parameters, int mode, int fill, std::int64_t n, int type_a, void* a,
                           std::int64_t lda, int type_w, void* w, int computed, void* on_device,
                           std::size_t device_bytes, void* on_host, std::size_t host_bytes, int* info,
                           std::int64_t batch) {
    if (!is_valid_batch(handle, parameters, mode, fill, n, lda, type_a, type_w, computed, batch) ||
        device_bytes < device_workspace(n, batch) || host_bytes < host_workspace(batch)) {
        return kInvalidValue;
    }
    ++syev_batched_calls;
    std::memset(on_device, 0xFF, device_bytes);
    std::memset(on_host, 0xFF, host_bytes);
    if (type_a == 1) {
        syev_batched(static_cast<double*>(a), static_cast<double*>(w), info, n, batch);
    } else {
        syev_batched(static_cast<float*>(a), static_cast<float*>(w), info, n, batch);
    }
    return kSuccess;
}
#endif

}  // extern "C"
