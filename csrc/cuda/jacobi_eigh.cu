#include "cuda/jacobi_eigh.cuh"
#include "cuda/registry.h"

SSTMERGE_REGISTER_KERNELS(SSTMERGE_JACOBI_EIGH_KERNELS)
