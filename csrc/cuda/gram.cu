#include "cuda/gram.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_GRAM_KERNELS)
