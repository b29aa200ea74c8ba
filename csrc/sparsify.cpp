#include "sparsify.h"

#include <algorithm>

#include "cuda/random.cuh"
#include "half.h"
#include "selection.h"

namespace sstmerge {
namespace {

// Entries that a thread takes at a time; a multiple of four, because four entries share a block of random words.
constexpr std::int64_t kBlock = 1 << 14;

// A tensor of at least this many entries is shared by all threads while its largest entries are selected.
constexpr std::int64_t kShared = 1 << 19;

// Calls `function(Element{})` with the C++ type of a dtype.
template <typename Function>
void with_element(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::kFloat16:
            return function(Float16{});
        case Dtype::kBfloat16:
            return function(Bfloat16{});
        case Dtype::kFloat32:
            return function(float{});
        case Dtype::kFloat64:
            return function(double{});
    }
}

// Calls `function(tensor, begin, end)` for blocks that cover all tensors.
template <typename Function>
void for_each_block(const std::vector<std::int64_t>& sizes, int num_threads, Function function) {
    struct Block {
        std::size_t tensor;
        std::int64_t begin;
    };
    std::vector<Block> blocks;
    for (std::size_t tensor = 0; tensor < sizes.size(); ++tensor) {
        for (std::int64_t begin = 0; begin < sizes[tensor]; begin += kBlock) blocks.push_back({tensor, begin});
    }
    const std::int64_t count = static_cast<std::int64_t>(blocks.size());
#pragma omp parallel for num_threads(num_threads) schedule(static) if (count > 1 && num_threads > 1)
    for (std::int64_t number = 0; number < count; ++number) {
        const Block& block = blocks[number];
        function(block.tensor, block.begin, std::min(block.begin + kBlock, sizes[block.tensor]));
    }
}

// The selection of every tensor; sizes and counts repeat after `sizes.size()` tensors.
template <typename Bits>
std::vector<Selection<Bits>> select_all(const std::vector<const void*>& values, const std::vector<std::int64_t>& sizes,
                                        const std::vector<std::int64_t>& kept, int num_threads) {
    std::vector<Selection<Bits>> selections(values.size());
    const std::int64_t count = static_cast<std::int64_t>(values.size());
    const auto select = [&](std::int64_t tensor, int threads) {
        const std::size_t problem = tensor % sizes.size();
        selections[tensor] =
            select_largest(static_cast<const Bits*>(values[tensor]), sizes[problem], kept[problem], threads);
    };
    const auto is_shared = [&](std::int64_t tensor) { return sizes[tensor % sizes.size()] >= kShared; };
    for (std::int64_t tensor = 0; tensor < count; ++tensor) {
        if (is_shared(tensor)) select(tensor, num_threads);
    }
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (count > 1 && num_threads > 1)
    for (std::int64_t tensor = 0; tensor < count; ++tensor) {
        if (!is_shared(tensor)) select(tensor, 1);
    }
    return selections;
}

// Calls `function(begin, end, limit)` for the parts of a range in which magnitudes above the limit are kept.
template <typename Bits, typename Function>
void split_at_last_equal(const Selection<Bits>& selection, std::int64_t begin, std::int64_t end, Function function) {
    const std::int64_t middle = std::clamp(selection.last_equal + 1, begin, end);
    function(begin, middle, selection.limit_before());
    function(middle, end, selection.limit_after());
}

// What the tasks say about a few neighbouring entries. Sums and numbers of either sign are kept until the sign is
// known, so that every task is read once. The numbers are floating-point, because then all loops run on vector
// registers.
template <typename Element>
struct Votes {
    using Real = decltype(widen(Element{}));
    using Bits = typename BitsOfWidth<sizeof(Element)>::Type;
    static constexpr std::int64_t kEntries = 512;

    Real total[kEntries] = {}, positive[kEntries] = {}, negative[kEntries] = {};
    Real positives[kEntries] = {}, negatives[kEntries] = {};

    void add(const Bits* values, std::int64_t begin, std::int64_t end, Bits limit, Real weight) {
        for (std::int64_t i = begin; i < end; ++i) {
            const bool kept = (values[i] & kMagnitude<Bits>) > limit;
            const Real value = kept ? widen(bit_cast<Element>(values[i])) : Real{0};
            const Real weighted = weight * value;
            total[i] += value;
            positive[i] += value <= 0 ? Real{0} : weighted;  // NaN counts for both
            negative[i] += value >= 0 ? Real{0} : weighted;
            positives[i] += value > 0 ? Real{1} : Real{0};
            negatives[i] += value < 0 ? Real{1} : Real{0};
        }
    }

    void write(Element* outputs, std::int64_t count, MajoritySign majority_sign) const {
        for (std::int64_t i = 0; i < count; ++i) {
            const Real vote = majority_sign == MajoritySign::kTotal ? total[i] : positives[i] - negatives[i];
            const Real sum = vote >= 0 ? positive[i] : negative[i];
            const Real number = vote >= 0 ? positives[i] : negatives[i];
            outputs[i] = round_to<Element>(sum / std::max(number, Real{1}));
        }
    }
};

template <typename Element>
void dare_block(const Element* values, Element* outputs, std::int64_t begin, std::int64_t end, std::uint64_t seed,
                std::uint64_t stream, std::uint64_t keep_below, double scale) {
    using Real = decltype(widen(Element{}));
    constexpr std::int64_t kGroups = 64, kEntries = 4 * kGroups;
    const std::uint32_t highest_kept = static_cast<std::uint32_t>(keep_below - 1);
    std::uint32_t words[kEntries];
    for (std::int64_t first = begin; first < end; first += kEntries) {
        for (std::int64_t group = 0; group < kGroups; ++group) {
            const RandomBlock random = random_words(seed, stream, first / 4 + group);
            for (int word = 0; word < 4; ++word) words[4 * group + word] = random.word[word];
        }
        const std::int64_t count = std::min(kEntries, end - first);
        for (std::int64_t i = 0; i < count; ++i) {
            const Real scaled = widen(values[first + i]) * static_cast<Real>(scale);
            outputs[first + i] = round_to<Element>(words[i] <= highest_kept ? scaled : Real{0});
        }
    }
}

}  // namespace

void magnitude_prune(Dtype dtype, const TensorList& tensors, const std::vector<std::int64_t>& kept, int num_threads) {
    with_element(dtype, [&](auto element) {
        using Bits = typename BitsOfWidth<sizeof element>::Type;
        const auto selections = select_all<Bits>(tensors.values, tensors.sizes, kept, num_threads);
        for_each_block(tensors.sizes, num_threads, [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
            const Bits* values = static_cast<const Bits*>(tensors.values[tensor]);
            Bits* outputs = static_cast<Bits*>(tensors.outputs[tensor]);
            split_at_last_equal(selections[tensor], begin, end, [&](std::int64_t first, std::int64_t last, Bits limit) {
                for (std::int64_t i = first; i < last; ++i) {
                    outputs[i] = (values[i] & kMagnitude<Bits>) > limit ? values[i] : Bits{0};
                }
            });
        });
    });
}

void dare(Dtype dtype, const TensorList& tensors, std::uint64_t seed, std::uint64_t first_stream,
          std::uint64_t keep_below, double scale, int num_threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        for_each_block(tensors.sizes, num_threads, [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
            dare_block(static_cast<const Element*>(tensors.values[tensor]),
                       static_cast<Element*>(tensors.outputs[tensor]), begin, end, seed, first_stream + tensor,
                       keep_below, scale);
        });
    });
}

void ties(Dtype dtype, const TensorList& tensors, const std::vector<std::int64_t>& kept,
          const std::vector<double>& weights, MajoritySign majority_sign, int num_threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        using Bits = typename Votes<Element>::Bits;
        using Real = typename Votes<Element>::Real;
        const auto selections = select_all<Bits>(tensors.values, tensors.sizes, kept, num_threads);
        const auto merge = [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
            Votes<Element> votes;
            for (std::size_t task = 0; task < weights.size(); ++task) {
                const std::size_t number = task * tensors.sizes.size() + tensor;
                const Bits* values = static_cast<const Bits*>(tensors.values[number]) + begin;
                split_at_last_equal(
                    selections[number], begin, end, [&](std::int64_t first, std::int64_t last, Bits limit) {
                        votes.add(values, first - begin, last - begin, limit, static_cast<Real>(weights[task]));
                    });
            }
            votes.write(static_cast<Element*>(tensors.outputs[tensor]) + begin, end - begin, majority_sign);
        };
        for_each_block(tensors.sizes, num_threads, [&](std::size_t tensor, std::int64_t begin, std::int64_t end) {
            for (std::int64_t first = begin; first < end; first += Votes<Element>::kEntries) {
                merge(tensor, first, std::min(first + Votes<Element>::kEntries, end));
            }
        });
    });
}

}  // namespace sstmerge
