#include "cuda/project_partials.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_PROJECT_PARTIALS_KERNELS)
