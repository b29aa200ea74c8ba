#include "cuda/eigh_stages.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_EIGH_STAGES_KERNELS)
