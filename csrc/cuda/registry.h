// Kernels by name: <op>.cuh ends with the list of its kernels, which <op>.cu registers.
#pragma once

#include <cstddef>
#include <vector>

namespace sstmerge::cuda {

struct Kernel {
    const char* name;
    const void* function;
    std::size_t parameters;
};

template <typename... Parameters>
constexpr std::size_t count_parameters(void (*)(Parameters...)) {
    return sizeof...(Parameters);
}

// Remembers kernels for `launch`; returns true.
bool register_kernels(const std::vector<Kernel>& kernels);

}  // namespace sstmerge::cuda

#define SSTMERGE_KERNEL_ENTRY(kernel) \
    {#kernel, reinterpret_cast<const void*>(&kernel), sstmerge::cuda::count_parameters(kernel)},

// Puts the kernels of an op's list into the module when it is loaded.
#define SSTMERGE_REGISTER_KERNELS(list) \
    static const bool kernels_are_registered = sstmerge::cuda::register_kernels({list(SSTMERGE_KERNEL_ENTRY)});
