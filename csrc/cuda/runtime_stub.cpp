#include "build_info.h"  // written by setup.py
#include "cuda/runtime.h"

namespace sstmerge::cuda {

std::string build_reason() { return SSTMERGE_CUDA_BUILD_REASON; }

std::pair<int, std::string> device_count() { return {0, "this build of sstmerge has no CUDA: " + build_reason()}; }

}  // namespace sstmerge::cuda
