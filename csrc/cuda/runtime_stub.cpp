#include <stdexcept>

#include "build_info.h"  // written by setup.py
#include "cuda/runtime.h"

namespace sstmerge::cuda {
namespace {

std::string words() { return "this build of sstmerge has no CUDA: " + build_reason(); }

}  // namespace

std::string build_reason() { return SSTMERGE_CUDA_BUILD_REASON; }

std::pair<int, std::string> device_count() { return {0, words()}; }

std::vector<std::string> kernel_names() { return {}; }

KernelAttributes kernel_attributes(const std::string&, int) { throw std::runtime_error(words()); }

void launch(const std::string&, std::array<unsigned, 3>, unsigned, unsigned, int, std::uintptr_t, const std::string&) {
    throw std::runtime_error(words());
}

}  // namespace sstmerge::cuda
