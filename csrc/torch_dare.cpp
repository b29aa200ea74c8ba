#include "torch_dare.h"

#include <algorithm>
#include <cmath>

#include "half.h"

namespace sstmerge {
namespace {

class MersenneTwister {
  public:
    explicit MersenneTwister(TorchGeneratorState* state) : state_(state) {
        std::copy_n(state->words, kWords, words_);
        // Where nothing is left, torch leaves `next` at the end, or, after seeding, at the beginning.
        next_ = state->left == 1 ? kWords : static_cast<int>(state->next);
    }

    // Writes the state back if any number was drawn.
    void finish() {
        if (!has_drawn_) return;
        std::copy_n(words_, kWords, state_->words);
        state_->next = static_cast<std::uint64_t>(next_);
        state_->left = kWords + 1 - next_;
    }

    void draw(std::uint32_t* numbers, std::int64_t count) {
        has_drawn_ = has_drawn_ || count > 0;
        while (count > 0) {
            if (next_ == kWords) renew();
            const int taken = static_cast<int>(std::min<std::int64_t>(kWords - next_, count));
            for (int i = 0; i < taken; ++i) numbers[i] = tempered(words_[next_ + i]);
            next_ += taken;
            numbers += taken;
            count -= taken;
        }
    }

  private:
    static constexpr int kWords = TorchGeneratorState::kWords, kShift = 397;

    static std::uint32_t tempered(std::uint32_t word) {
        word ^= word >> 11;
        word ^= word << 7 & 0x9D2C5680u;
        word ^= word << 15 & 0xEFC60000u;
        return word ^ word >> 18;
    }

    static std::uint32_t twisted(std::uint32_t word, std::uint32_t following) {
        const std::uint32_t mixed = (word & 0x80000000u) | (following & 0x7FFFFFFFu);
        return mixed >> 1 ^ (0u - (following & 1u) & 0x9908B0DFu);
    }

    // Every word is made of later ones and of one that was renewed 227 words ago: all loops run on vector registers.
    void renew() {
        constexpr int kEarly = kWords - kShift;
        for (int i = 0; i < kEarly; ++i) words_[i] = words_[i + kShift] ^ twisted(words_[i], words_[i + 1]);
        for (int i = kEarly; i < kWords - 1; ++i) words_[i] = words_[i - kEarly] ^ twisted(words_[i], words_[i + 1]);
        words_[kWords - 1] = words_[kShift - 1] ^ twisted(words_[kWords - 1], words_[0]);
        next_ = 0;
    }

    TorchGeneratorState* state_;
    std::uint32_t words_[kWords];
    int next_;
    bool has_drawn_ = false;
};

// A uniform number of torch is the lowest 24 bits of a word, or the lowest 53 of two, as a fraction: which fractions
// are below the probability is decided on integers.
template <typename Element>
struct Draws {
    static constexpr int kWords = 1;
    static constexpr std::uint32_t kRange = 1u << 24;
    static std::uint32_t number(const std::uint32_t* words, int i) { return words[i] & (kRange - 1); }
};
template <>
struct Draws<double> {
    static constexpr int kWords = 2;
    static constexpr std::uint64_t kRange = std::uint64_t{1} << 53;
    static std::uint64_t number(const std::uint32_t* words, int i) {
        return (std::uint64_t{words[2 * i]} << 32 | words[2 * i + 1]) & (kRange - 1);
    }
};

template <typename Element>
void dare(const Element* values, Element* output, std::int64_t size, double probability, double density,
          MersenneTwister& twister) {
    using Real = decltype(widen(Element{}));
    using Numbers = Draws<Element>;
    constexpr int kEntries = TorchGeneratorState::kWords;
    const auto bound = static_cast<decltype(Numbers::number(nullptr, 0))>(std::ceil(probability * Numbers::kRange));
    const Real divisor = static_cast<Real>(density);
    std::uint32_t words[kEntries * Numbers::kWords];
    for (std::int64_t first = 0; first < size; first += kEntries) {
        const int count = static_cast<int>(std::min<std::int64_t>(kEntries, size - first));
        twister.draw(words, count * Numbers::kWords);
        for (int i = 0; i < count; ++i) {
            const Real kept = Numbers::number(words, i) < bound ? Real{1} : Real{0};
            output[first + i] = round_to<Element>(widen(values[first + i]) * kept / divisor);
        }
    }
}

}  // namespace

bool is_valid(const TorchGeneratorState& state) {
    constexpr int kWords = TorchGeneratorState::kWords;
    if (state.seeded != 1 || state.left < 1 || state.left > kWords) return false;
    if (state.left > 1 && state.next != static_cast<std::uint64_t>(kWords + 1 - state.left)) return false;
    return std::all_of(state.words, state.words + kWords, [](std::uint64_t word) { return word >> 32 == 0; });
}

void torch_dare(Dtype dtype, const void* values, void* output, std::int64_t size, double probability, double density,
                TorchGeneratorState* state) {
    MersenneTwister twister(state);
    const auto run = [&](auto element) {
        using Element = decltype(element);
        dare(static_cast<const Element*>(values), static_cast<Element*>(output), size, probability, density, twister);
    };
    switch (dtype) {
        case Dtype::kFloat16:
            run(Float16{});
            break;
        case Dtype::kBfloat16:
            run(Bfloat16{});
            break;
        case Dtype::kFloat32:
            run(float{});
            break;
        case Dtype::kFloat64:
            run(double{});
            break;
    }
    twister.finish();
}

}  // namespace sstmerge
