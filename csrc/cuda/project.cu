#include "cuda/project.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_PROJECT_KERNELS)
