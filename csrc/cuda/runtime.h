// The seam between the module and CUDA: runtime.cu implements it where nvcc was there at build time, runtime_stub.cpp
// where it was not. Kernels belong beside it: <op>.cuh holds the device code, free of host headers so that NVRTC can
// compile the same file, and <op>.cu puts it into the module.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace sstmerge::cuda {

// Why this build has no CUDA; empty where it has.
std::string build_reason();

// The number of usable devices and, where it is zero, the reason; a machine without a driver gets an answer too.
std::pair<int, std::string> device_count();

// Names of all kernels in this build.
std::vector<std::string> kernel_names();

// What a kernel takes of a device, as the compiler left it.
struct KernelAttributes {
    int registers;    // per thread
    int local_bytes;  // per thread: spilled registers and arrays
    int max_threads;  // per block
};
KernelAttributes kernel_attributes(const std::string& name, int device);

// Puts a kernel on a stream and returns; nothing waits for the device. `arguments` holds one 8-byte slot per parameter,
// each with the parameter's bytes at its start. Throws std::invalid_argument for an unknown kernel or a wrong number of
// arguments, and std::runtime_error with CUDA's words where the launch is refused.
void launch(const std::string& name, std::array<unsigned, 3> grid, unsigned block, unsigned shared_bytes, int device,
            std::uintptr_t stream, const std::string& arguments);

}  // namespace sstmerge::cuda
