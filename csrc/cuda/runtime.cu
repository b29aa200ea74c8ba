#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>

#include "cuda/registry.h"
#include "cuda/runtime.h"

namespace sstmerge::cuda {

namespace {

// What a block may use without asking for more.
constexpr unsigned kDefaultSharedBytes = 48 * 1024;

// A function's variable, because tables are registered while the module's variables are still being initialised.
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> by_name;
    return by_name;
}

const Kernel& find(const std::string& name) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) throw std::invalid_argument("there is no CUDA kernel '" + name + "' in this build");
    return found->second;
}

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps the error until somebody has read it
    throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a device current while it lives; every CUDA call acts on the current one.
class CurrentDevice {
  public:
    explicit CurrentDevice(int device) {
        check(cudaGetDevice(&previous_), "the current CUDA device cannot be read");
        check(cudaSetDevice(device), "CUDA device " + std::to_string(device) + " cannot be used");
    }
    ~CurrentDevice() { cudaSetDevice(previous_); }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

  private:
    int previous_ = 0;
};

// Lets a kernel use as much shared memory as the device has; once per kernel and device.
void allow_shared_memory(const Kernel& kernel, int device) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> done;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!done.insert({kernel.function, device}).second) return;
    int limit = 0;
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "no shared memory limit");
    const cudaError_t error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) done.erase({kernel.function, device});
    check(error,
          std::string("kernel ") + kernel.name + " cannot use " + std::to_string(limit) + " bytes of shared memory");
}

}  // namespace

bool register_kernels(const std::vector<Kernel>& table) {
    for (const Kernel& kernel : table) kernels().emplace(kernel.name, kernel);
    return true;
}

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

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& [name, function] : kernels()) names.push_back(name);
    return names;
}

KernelAttributes kernel_attributes(const std::string& name, int device) {
    const CurrentDevice current(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, find(name).function), "kernel " + name + " cannot be used on this device");
    return {attributes.numRegs, static_cast<int>(attributes.localSizeBytes), attributes.maxThreadsPerBlock};
}

void launch(const std::string& name, std::array<unsigned, 3> grid, unsigned block, unsigned shared_bytes, int device,
            std::uintptr_t stream, const std::string& arguments) {
    constexpr std::size_t kSlot = 8;
    const Kernel& kernel = find(name);
    if (arguments.size() != kernel.parameters * kSlot) {
        throw std::invalid_argument("kernel " + name + " takes " + std::to_string(kernel.parameters) +
                                    " arguments, not " + std::to_string(arguments.size() / kSlot));
    }
    const CurrentDevice current(device);
    if (shared_bytes > kDefaultSharedBytes) allow_shared_memory(kernel, device);
    std::vector<std::uint64_t> slots(arguments.size() / kSlot);
    std::vector<void*> pointers;
    arguments.copy(reinterpret_cast<char*>(slots.data()), slots.size() * kSlot);
    for (std::uint64_t& slot : slots) pointers.push_back(&slot);
    check(cudaLaunchKernel(kernel.function, {grid[0], grid[1], grid[2]}, {block, 1, 1}, pointers.data(), shared_bytes,
                           reinterpret_cast<cudaStream_t>(stream)),
          "kernel " + name + " cannot be launched");
}

}  // namespace sstmerge::cuda
