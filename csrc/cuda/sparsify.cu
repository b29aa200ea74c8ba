#include "cuda/registry.h"
#include "cuda/sparsify.cuh"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_SPARSIFY_KERNELS)
