// The seam between the module and CUDA: runtime.cu implements it where nvcc was there at build time, runtime_stub.cpp
// where it was not. Kernels belong beside it: <op>.cuh holds the device code, free of host headers so that NVRTC can
// compile the same file, and <op>.cu launches it on the caller's stream.
#pragma once

#include <string>
#include <utility>

namespace sstmerge::cuda {

// Why this build has no CUDA; empty where it has.
std::string build_reason();

// The number of usable devices and, where it is zero, the reason; a machine without a driver gets an answer too.
std::pair<int, std::string> device_count();

}  // namespace sstmerge::cuda
