// Kernels by name. <op>.cuh ends with the list of its kernels, which <op>.cu turns into the op's table, and kernels.cu
// knows all tables.
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

}  // namespace sstmerge::cuda

#define SSTMERGE_KERNEL_ENTRY(kernel) {#kernel, reinterpret_cast<const void*>(&kernel), count_parameters(kernel)},

// Defines `std::vector<Kernel> sstmerge::cuda::<op>_kernels()` from the op's list.
#define SSTMERGE_KERNEL_TABLE(op, list)                                          \
    namespace sstmerge::cuda {                                                   \
    std::vector<Kernel> op##_kernels() { return {list(SSTMERGE_KERNEL_ENTRY)}; } \
    }
