#include "cuda/filter_cores.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_FILTER_CORES_KERNELS)
