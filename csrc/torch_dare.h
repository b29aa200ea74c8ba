// DARE on the CPU with the random numbers of torch's own generator, number for number as torch.bernoulli draws them.
#pragma once

#include <cstdint>

#include "sparsify.h"

namespace sstmerge {

// The state of torch's CPU generator, as torch.Generator.get_state() lays it out; other fields follow. The generator is
// the Mersenne Twister mt19937 (Matsumoto and Nishimura 1998), whose 624 words it keeps in twice the space.
struct TorchGeneratorState {
    static constexpr int kWords = 624;

    std::uint64_t initial_seed;
    std::int32_t left;  // numbers until the words are renewed, that step included: from 1 to 624
    std::int32_t seeded;
    std::uint64_t next;  // the word that comes next; what it is when left is 1 does not matter
    std::uint64_t words[kWords];
};

// Whether the numbers of a state fit together, so that no word beyond its end is read.
bool is_valid(const TorchGeneratorState& state);

// Keeps an entry where a uniform random number is below `probability` and divides it by `density`; multiplies others by
// zero. Rounds to the dtype after the division. Draws one word per entry, two for float64; leaves the state as torch
// does.
void torch_dare(Dtype dtype, const void* values, void* output, std::int64_t size, double probability, double density,
                TorchGeneratorState* state);

}  // namespace sstmerge
