#include "cuda/filter_cores.cuh"
#include "cuda/registry.h"

SSTMERGE_KERNEL_TABLE(filter_cores, SSTMERGE_FILTER_CORES_KERNELS)
