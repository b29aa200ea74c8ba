#include "cuda/fused_scores.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_FUSED_SCORES_KERNELS)
