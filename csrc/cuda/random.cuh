// Random numbers by counter: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), for the
// kernels and for the C++ of the CPU, so that a seed gives the same numbers on every device and in any order.
#pragma once

#if defined(__CUDACC__)  // nvcc and NVRTC
#define SSTMERGE_INLINE __device__ __forceinline__
#else
#define SSTMERGE_INLINE inline
#endif

namespace sstmerge {

struct RandomBlock {
    unsigned word[4];
};

// Four random words of 32 bits each for a counter of 128 bits (lowest word first) and a key of 64.
SSTMERGE_INLINE RandomBlock philox(RandomBlock counter, unsigned key_low, unsigned key_high) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const unsigned long long first = 0xD2511F53ull * counter.word[0];
        const unsigned long long second = 0xCD9E8D57ull * counter.word[2];
        counter = {{static_cast<unsigned>(second >> 32) ^ counter.word[1] ^ key_low, static_cast<unsigned>(second),
                    static_cast<unsigned>(first >> 32) ^ counter.word[3] ^ key_high, static_cast<unsigned>(first)}};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

// The four words that belong to the elements 4 * group ... 4 * group + 3 of a stream.
SSTMERGE_INLINE RandomBlock random_words(unsigned long long seed, unsigned long long stream, unsigned long long group) {
    return philox({{static_cast<unsigned>(group), static_cast<unsigned>(group >> 32), static_cast<unsigned>(stream),
                    static_cast<unsigned>(stream >> 32)}},
                  static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32));
}

}  // namespace sstmerge
