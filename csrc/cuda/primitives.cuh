// The hardware-specific words that kernels are written in. Here they are PTX, without any CUDA header, so that nvcc and
// NVRTC compile the same files anywhere. tests/emulation/emulation.h defines the same words for the CPU, where the
// kernels are proved right without a GPU; whatever a kernel needs beyond plain C++ belongs into both files.
#pragma once

#ifdef SSTMERGE_EMULATION
#include "emulation.h"
#else

// The block's dynamic shared memory, at an alignment that 16-byte copies and matrix loads need.
#define SSTMERGE_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace sstmerge::device {

// Storage of half-precision numbers: two bytes and no arithmetic, which is done in float.
struct Bfloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Rounds to the nearest number of type Element, ties to even.
template <typename Element>
__device__ __forceinline__ Element round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ Bfloat16 round_to<Bfloat16>(float value) {
    Bfloat16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}
template <>
__device__ __forceinline__ Float16 round_to<Float16>(float value) {
    Float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts copying `bytes` (0 to 16) of 16 from global to shared memory and fills the rest with zeros. Both addresses are
// multiples of 16, also where nothing is read. The copy belongs to the thread's next group.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` of this thread's groups are still under way; other threads' copies need a barrier too.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives of matrix
// m the elements (l / 4, 2 (l % 4)) and its right neighbour in fragment[m]; transposed: the elements of the transpose.
__device__ __forceinline__ void load_matrix_x4(unsigned (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16 x 8, float) += a (16 x 16) b (16 x 8), in the fragment layout of mma.m16n8k16 in the PTX manual.
template <typename Element>
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply_16x8x16<Bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                           unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_16x8x16<Float16>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                          unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace sstmerge::device

#endif  // SSTMERGE_EMULATION
