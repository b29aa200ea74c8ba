// Magnitude pruning, DARE and TIES on the CPU, on lists of tensors of any sizes; threads over tensors and over blocks
// of large ones. Results depend neither on the number of threads nor on what else is in the list.
#pragma once

#include <cstdint>
#include <vector>

namespace sstmerge {

enum class Dtype { kFloat16, kBfloat16, kFloat32, kFloat64 };

// Contiguous tensors of one dtype.
struct TensorList {
    std::vector<const void*> values;
    std::vector<void*> outputs;  // disjoint from the values
    std::vector<std::int64_t> sizes;
};

// Of tensor i keeps the kept[i] entries of largest magnitude, those of the lowest index where magnitudes are equal, and
// writes zero for the others. NaN is larger than any number.
void magnitude_prune(Dtype dtype, const TensorList& tensors, const std::vector<std::int64_t>& kept, int num_threads);

// Keeps an entry where its random word is below `keep_below`, multiplied by `scale`, and writes zero for the others.
// Entry e of tensor i has word e % 4 of the Philox block with the counter (e / 4, first_stream + i) and the key `seed`.
void dare(Dtype dtype, const TensorList& tensors, std::uint64_t seed, std::uint64_t first_stream,
          std::uint64_t keep_below, double scale, int num_threads);

// What elects the sign of an entry: the sum of the tasks' entries, or the number of either sign.
enum class MajoritySign { kTotal, kFrequency };

// Output i merges tensor i of every task: each is trimmed to kept[i] entries as by magnitude_prune, the sign is elected
// (positive where it is a draw), and the entries of that sign are weighted, added and divided by their number. The
// `values` hold the tensors of the first task, then those of the second, and so on; there are as many as weights.
void ties(Dtype dtype, const TensorList& tensors, const std::vector<std::int64_t>& kept,
          const std::vector<double>& weights, MajoritySign majority_sign, int num_threads);

}  // namespace sstmerge
