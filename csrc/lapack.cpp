#include "lapack.h"

#include <dlfcn.h>

#include <stdexcept>

namespace sstmerge {
namespace {

using SetThreadsFunction = int (*)(int);

template <typename Scalar>
SygvdFunction<Scalar> bound_sygvd = nullptr;

SetThreadsFunction set_blas_threads = nullptr;
std::mutex blas_threads_mutex;

template <typename Scalar>
std::string expected_signature() {
    const std::string scalar =
        std::string("__pyx_t_5scipy_6linalg_13cython_lapack_") + (sizeof(Scalar) == sizeof(double) ? "d *" : "s *");
    return "void (int *, char *, char *, int *, " + scalar + ", int *, " + scalar + ", int *, " + scalar + ", " +
           scalar + ", int *, int *, int *, int *)";
}

// The pointer lies in scipy's wrapper library. A symbol search that starts there also visits the libraries it was
// linked with, so it finds the OpenBLAS that the wrapper calls and no other one in the process.
SetThreadsFunction find_set_blas_threads(void* function) {
    Dl_info wrapper;
    if (dladdr(function, &wrapper) == 0) return nullptr;
    void* library = dlopen(wrapper.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    void* symbol = dlsym(library, "openblas_set_num_threads_local");
    dlclose(library);
    return reinterpret_cast<SetThreadsFunction>(symbol);
}

}  // namespace

template <typename Scalar>
void bind_sygvd(void* function, const std::string& signature) {
    if (signature != expected_signature<Scalar>()) {
        throw std::invalid_argument("scipy's LAPACK sygvd has the signature '" + signature + "' where '" +
                                    expected_signature<Scalar>() + "' was expected");
    }
    bound_sygvd<Scalar> = reinterpret_cast<SygvdFunction<Scalar>>(function);
    set_blas_threads = find_set_blas_threads(function);
}

template <typename Scalar>
SygvdFunction<Scalar> sygvd() {
    if (bound_sygvd<Scalar> == nullptr) throw std::logic_error("call bind_lapack before solving");
    return bound_sygvd<Scalar>;
}

SingleThreadedBlas::SingleThreadedBlas() : turn_(blas_threads_mutex) {
    if (set_blas_threads != nullptr) previous_ = set_blas_threads(1);
}

SingleThreadedBlas::~SingleThreadedBlas() {
    if (set_blas_threads != nullptr) set_blas_threads(previous_);
}

template void bind_sygvd<float>(void*, const std::string&);
template void bind_sygvd<double>(void*, const std::string&);
template SygvdFunction<float> sygvd<float>();
template SygvdFunction<double> sygvd<double>();

}  // namespace sstmerge
