#include "cuda/registry.h"
#include "cuda/score_epilogues.cuh"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_SCORE_EPILOGUES_KERNELS)
