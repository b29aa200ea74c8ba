#include "cusolver_api.h"

#include <dlfcn.h>

namespace sstmerge::cusolver {
namespace {

// Looks symbols up and remembers which are missing. cuBLAS is among what libcusolver was linked with, and a search that
// starts at libcusolver visits that too.
class Symbols {
  public:
    explicit Symbols(void* library) : library_(library) {}

    template <typename Function>
    void find(Function& function, const std::string& name) {
        function = reinterpret_cast<Function>(dlsym(library_, name.c_str()));
        if (function == nullptr) missing_ += (missing_.empty() ? "" : ", ") + name;
    }

    template <typename Function>
    void find_if_there(Function& function, const char* name) {
        function = reinterpret_cast<Function>(dlsym(library_, name));
    }

    const std::string& missing() const { return missing_; }

  private:
    void* library_;
    std::string missing_;
};

template <typename Scalar>
void find_typed(Symbols& symbols, TypedApi<Scalar>& api, const std::string& letter) {
    symbols.find(api.sygvd_buffer_size, "cusolverDn" + letter + "sygvd_bufferSize");
    symbols.find(api.sygvd, "cusolverDn" + letter + "sygvd");
    symbols.find(api.potrf_batched, "cusolverDn" + letter + "potrfBatched");
    symbols.find(api.trsm_batched, "cublas" + letter + "trsmBatched");
}

std::string name_in(const std::vector<std::pair<int, const char*>>& names, int status) {
    for (const auto& [number, name] : names) {
        if (number == status) return name;
    }
    return "status " + std::to_string(status);
}

}  // namespace

std::string load(const std::vector<std::string>& candidate, Api& api) {
    void* library = nullptr;
    for (const std::string& file : candidate) {
        // Never closed: handles may live as long as the process.
        library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            const char* words = dlerror();
            return words == nullptr ? file + " cannot be loaded" : words;
        }
    }
    if (library == nullptr) return "an empty list of libraries";
    Api found{};
    Symbols symbols(library);
    symbols.find(found.create, "cusolverDnCreate");
    symbols.find(found.destroy, "cusolverDnDestroy");
    symbols.find(found.set_stream, "cusolverDnSetStream");
    symbols.find(found.create_parameters, "cusolverDnCreateParams");
    symbols.find(found.destroy_parameters, "cusolverDnDestroyParams");
    symbols.find(found.blas_create, "cublasCreate_v2");
    symbols.find(found.blas_set_stream, "cublasSetStream_v2");
    symbols.find_if_there(found.syev_batched_buffer_size, "cusolverDnXsyevBatched_bufferSize");
    symbols.find_if_there(found.syev_batched, "cusolverDnXsyevBatched");
    find_typed(symbols, found.float32, "S");
    find_typed(symbols, found.float64, "D");
    if (!symbols.missing().empty()) return candidate.back() + " has no " + symbols.missing();
    found.path = candidate.back();
    api = found;
    return "";
}

std::string solver_status(int status) {
    return name_in({{1, "CUSOLVER_STATUS_NOT_INITIALIZED"},
                    {2, "CUSOLVER_STATUS_ALLOC_FAILED"},
                    {3, "CUSOLVER_STATUS_INVALID_VALUE"},
                    {4, "CUSOLVER_STATUS_ARCH_MISMATCH"},
                    {6, "CUSOLVER_STATUS_EXECUTION_FAILED"},
                    {7, "CUSOLVER_STATUS_INTERNAL_ERROR"},
                    {9, "CUSOLVER_STATUS_NOT_SUPPORTED"}},
                   status);
}

std::string blas_status(int status) {
    return name_in({{1, "CUBLAS_STATUS_NOT_INITIALIZED"},
                    {3, "CUBLAS_STATUS_ALLOC_FAILED"},
                    {7, "CUBLAS_STATUS_INVALID_VALUE"},
                    {8, "CUBLAS_STATUS_ARCH_MISMATCH"},
                    {13, "CUBLAS_STATUS_EXECUTION_FAILED"},
                    {14, "CUBLAS_STATUS_INTERNAL_ERROR"},
                    {15, "CUBLAS_STATUS_NOT_SUPPORTED"}},
                   status);
}

}  // namespace sstmerge::cusolver
