#include "cusolver.h"

#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cusolver_api.h"

namespace sstmerge::cusolver {
namespace {

void check(int status, const char* call) {
    if (status != kSuccess) throw std::runtime_error(std::string(call) + " failed: " + solver_status(status));
}

void check_blas(int status, const char* call) {
    if (status != kSuccess) throw std::runtime_error(std::string(call) + " failed: " + blas_status(status));
}

// What handles belong to, besides their thread: a library and a device.
using Owner = std::pair<int, int>;

struct Handles {
    Handle solver = nullptr, parameters = nullptr, blas = nullptr;
};

// Everything that outlives threads. Never destroyed: when the process ends, CUDA may be gone before its handles are.
struct Registry {
    std::mutex mutex;
    std::deque<Api> libraries;  // never moves its elements
    std::map<Owner, std::vector<Handles>> idle;
};

Registry& registry() {
    static Registry* const only = new Registry;
    return *only;
}

const Api& find(int library) {
    Registry& known = registry();
    const std::lock_guard<std::mutex> lock(known.mutex);
    if (library < 0 || library >= static_cast<int>(known.libraries.size())) {
        throw std::invalid_argument("there is no open cuSOLVER with the number " + std::to_string(library));
    }
    return known.libraries[library];
}

Handles create(const Api& api) {
    Handles handles;
    check(api.create(&handles.solver), "cusolverDnCreate");
    try {
        check(api.create_parameters(&handles.parameters), "cusolverDnCreateParams");
        check_blas(api.blas_create(&handles.blas), "cublasCreate");
    } catch (const std::runtime_error&) {
        if (handles.parameters != nullptr) api.destroy_parameters(handles.parameters);
        api.destroy(handles.solver);
        throw;
    }
    return handles;
}

// The handles of one thread. When it ends they go to the next thread that needs some: destroying them would wait for
// the device.
class ThreadHandles {
  public:
    ~ThreadHandles() {
        Registry& known = registry();
        const std::lock_guard<std::mutex> lock(known.mutex);
        for (const auto& [owner, handles] : own_) known.idle[owner].push_back(handles);
    }

    const Handles& of(const Owner& owner, const Api& api) {
        const auto found = own_.find(owner);
        if (found != own_.end()) return found->second;
        return own_.emplace(owner, take_idle(owner, api)).first->second;
    }

  private:
    static Handles take_idle(const Owner& owner, const Api& api) {
        {
            Registry& known = registry();
            const std::lock_guard<std::mutex> lock(known.mutex);
            std::vector<Handles>& idle = known.idle[owner];
            if (!idle.empty()) {
                const Handles handles = idle.back();
                idle.pop_back();
                return handles;
            }
        }
        return create(api);
    }

    std::map<Owner, Handles> own_;
};

thread_local ThreadHandles thread_handles;

// A library with this thread's handles, on the stream of the call.
struct Session {
    explicit Session(const Place& place)
        : api(find(place.library)), handles(thread_handles.of({place.library, place.device}, api)) {
        const auto stream = reinterpret_cast<Stream>(place.stream);
        check(api.set_stream(handles.solver, stream), "cusolverDnSetStream");
        check_blas(api.blas_set_stream(handles.blas, stream), "cublasSetStream");
    }

    const Api& api;
    const Handles& handles;
};

template <typename Scalar>
const TypedApi<Scalar>& typed(const Api& api) {
    if constexpr (sizeof(Scalar) == sizeof(double)) {
        return api.float64;
    } else {
        return api.float32;
    }
}

void check_sizes(int n, int batch) {
    if (n < 1 || batch < 1) throw std::invalid_argument("the size and the number of matrices must be at least one");
}

void check_has_syev_batched(const Api& api) {
    if (api.syev_batched == nullptr || api.syev_batched_buffer_size == nullptr) {
        throw std::invalid_argument(api.path + " has no cusolverDnXsyevBatched");
    }
}

}  // namespace

int open(const std::vector<std::vector<std::string>>& candidates) {
    std::string tried;
    for (const std::vector<std::string>& candidate : candidates) {
        Api api;
        const std::string reason = load(candidate, api);
        if (reason.empty()) {
            Registry& known = registry();
            const std::lock_guard<std::mutex> lock(known.mutex);
            known.libraries.push_back(api);
            return static_cast<int>(known.libraries.size()) - 1;
        }
        tried += (tried.empty() ? "" : "; ") + reason;
    }
    throw std::runtime_error("libcusolver cannot be loaded, tried: " + tried);
}

std::string path(int library) { return find(library).path; }

bool has_syev_batched(int library) {
    const Api& api = find(library);
    return api.syev_batched != nullptr && api.syev_batched_buffer_size != nullptr;
}

template <typename Scalar>
int sygvd_workspace(const Place& place, const Scalar* a, const Scalar* b, const Scalar* eigenvalues, int n) {
    check_sizes(n, 1);
    const Session session(place);
    int size = 0;
    check(typed<Scalar>(session.api)
              .sygvd_buffer_size(session.handles.solver, kEigType1, kEigModeVector, kFillModeLower, n, a, n, b, n,
                                 eigenvalues, &size),
          "cusolverDn<t>sygvd_bufferSize");
    return size;
}

template <typename Scalar>
void sygvd(const Place& place, Scalar* a, Scalar* b, Scalar* eigenvalues, Scalar* workspace, int workspace_size,
           int* info, int n, int batch) {
    check_sizes(n, batch);
    const Session session(place);
    const std::size_t size = static_cast<std::size_t>(n) * n;
    for (int problem = 0; problem < batch; ++problem) {
        check(typed<Scalar>(session.api)
                  .sygvd(session.handles.solver, kEigType1, kEigModeVector, kFillModeLower, n, a + problem * size, n,
                         b + problem * size, n, eigenvalues + static_cast<std::size_t>(problem) * n, workspace,
                         workspace_size, info + problem),
              "cusolverDn<t>sygvd");
    }
}

template <typename Scalar>
void potrf_batched(const Place& place, Scalar** matrices, int* info, int n, int batch) {
    check_sizes(n, batch);
    const Session session(place);
    check(typed<Scalar>(session.api).potrf_batched(session.handles.solver, kFillModeLower, n, matrices, n, info, batch),
          "cusolverDn<t>potrfBatched");
}

template <typename Scalar>
void trsm_batched(const Place& place, Solve solve, const Scalar* const* factors, Scalar* const* matrices, int n,
                  int batch) {
    check_sizes(n, batch);
    const Session session(place);
    const Scalar one = 1;
    const int side = solve == Solve::kFromTheRight ? kSideRight : kSideLeft;
    const int operation = solve == Solve::kForward ? kOperationNone : kOperationTranspose;
    check_blas(typed<Scalar>(session.api)
                   .trsm_batched(session.handles.blas, side, kFillModeLower, operation, kDiagonalNonUnit, n, n, &one,
                                 factors, n, matrices, n, batch),
               "cublas<t>trsmBatched");
}

template <typename Scalar>
std::pair<std::size_t, std::size_t> syev_batched_workspace(const Place& place, const Scalar* matrices,
                                                           const Scalar* eigenvalues, int n, int batch) {
    check_sizes(n, batch);
    const Session session(place);
    check_has_syev_batched(session.api);
    std::size_t device_bytes = 0, host_bytes = 0;
    constexpr int type = kDataType<Scalar>;
    check(session.api.syev_batched_buffer_size(session.handles.solver, session.handles.parameters, kEigModeVector,
                                               kFillModeLower, n, type, matrices, n, type, eigenvalues, type,
                                               &device_bytes, &host_bytes, batch),
          "cusolverDnXsyevBatched_bufferSize");
    return {device_bytes, host_bytes};
}

template <typename Scalar>
void syev_batched(const Place& place, Scalar* matrices, Scalar* eigenvalues, void* device_workspace,
                  std::size_t device_bytes, void* host_workspace, std::size_t host_bytes, int* info, int n, int batch) {
    check_sizes(n, batch);
    const Session session(place);
    check_has_syev_batched(session.api);
    constexpr int type = kDataType<Scalar>;
    check(session.api.syev_batched(session.handles.solver, session.handles.parameters, kEigModeVector, kFillModeLower,
                                   n, type, matrices, n, type, eigenvalues, type, device_workspace, device_bytes,
                                   host_workspace, host_bytes, info, batch),
          "cusolverDnXsyevBatched");
}

#define SSTMERGE_INSTANTIATE(Scalar)                                                                                \
    template int sygvd_workspace(const Place&, const Scalar*, const Scalar*, const Scalar*, int);                   \
    template void sygvd(const Place&, Scalar*, Scalar*, Scalar*, Scalar*, int, int*, int, int);                     \
    template void potrf_batched(const Place&, Scalar**, int*, int, int);                                            \
    template void trsm_batched(const Place&, Solve, const Scalar* const*, Scalar* const*, int, int);                \
    template std::pair<std::size_t, std::size_t> syev_batched_workspace(const Place&, const Scalar*, const Scalar*, \
                                                                        int, int);                                  \
    template void syev_batched(const Place&, Scalar*, Scalar*, void*, std::size_t, void*, std::size_t, int*, int, int);

SSTMERGE_INSTANTIATE(float)
SSTMERGE_INSTANTIATE(double)

}  // namespace sstmerge::cusolver
