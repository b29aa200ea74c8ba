#include <cuda_runtime_api.h>

#include "cuda/runtime.h"

namespace sstmerge::cuda {

std::string build_reason() { return ""; }

std::pair<int, std::string> device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();  // the runtime keeps the error until somebody has read it
        return {0, cudaGetErrorString(error)};
    }
    return {count, count > 0 ? "" : "the driver reports no device"};
}

}  // namespace sstmerge::cuda
