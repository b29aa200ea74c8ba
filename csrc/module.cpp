// The Python module sstmerge._C, a table of contents. sstmerge.ops validates, allocates, passes addresses and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_info.h"  // written by setup.py
#include "cuda/runtime.h"
#include "cusolver.h"
#include "generalized_eigh.h"
#include "lapack.h"
#include "sparsify.h"
#include "torch_dare.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// Numbers that would make native code read or write where it must not are refused here, whoever calls.
void require(bool holds, const char* words) {
    if (!holds) throw std::invalid_argument(words);
}

// scipy publishes a LAPACK routine as a capsule that holds the pointer and is named by the C signature.
void bind_lapack(const py::capsule& ssygvd, const py::capsule& dsygvd) {
    sstmerge::bind_sygvd<float>(ssygvd.get_pointer(), ssygvd.name());
    sstmerge::bind_sygvd<double>(dsygvd.get_pointer(), dsygvd.name());
}

template <typename Scalar>
void generalized_eigh(std::uintptr_t a, std::int64_t a_batch_stride, std::int64_t a_row_stride, std::uintptr_t b,
                      std::int64_t b_batch_stride, std::int64_t b_row_stride, std::uintptr_t eigenvalues,
                      std::uintptr_t eigenvectors, std::uintptr_t status, std::int64_t batch, int n, int num_threads) {
    require(n >= 0 && batch >= 0 && num_threads >= 1, "n and batch must be at least 0, and num_threads at least 1");
    require(a_batch_stride >= 0 && b_batch_stride >= 0, "the stride between matrices must not be negative");
    require(n <= 1 || (a_row_stride >= n && b_row_stride >= n), "the stride between rows must be at least n");
    require(batch == 0 || n == 0 || (a && b && eigenvalues && eigenvectors && status), "an address is null");
    sstmerge::generalized_eigh<Scalar>({reinterpret_cast<const Scalar*>(a), a_batch_stride, a_row_stride},
                                       {reinterpret_cast<const Scalar*>(b), b_batch_stride, b_row_stride},
                                       reinterpret_cast<Scalar*>(eigenvalues),
                                       {reinterpret_cast<Scalar*>(eigenvectors), std::int64_t{n} * n, n},
                                       reinterpret_cast<std::int32_t*>(status), batch, n, num_threads);
}

template <typename Scalar>
void define_generalized_eigh(py::module_& module, const char* name) {
    module.def(name, &generalized_eigh<Scalar>, "a"_a, "a_batch_stride"_a, "a_row_stride"_a, "b"_a, "b_batch_stride"_a,
               "b_row_stride"_a, "eigenvalues"_a, "eigenvectors"_a, "status"_a, "batch"_a, "n"_a, "num_threads"_a,
               py::call_guard<py::gil_scoped_release>());
}

// Registers, bytes of local memory, and threads per block.
std::tuple<int, int, int> cuda_kernel_attributes(const std::string& name, int device) {
    const auto attributes = sstmerge::cuda::kernel_attributes(name, device);
    return {attributes.registers, attributes.local_bytes, attributes.max_threads};
}

void cuda_launch(const std::string& name, std::array<unsigned, 3> grid, unsigned block, unsigned shared_bytes,
                 int device, std::uintptr_t stream, const py::bytes& arguments) {
    const std::string slots = arguments;
    const py::gil_scoped_release without_lock;
    sstmerge::cuda::launch(name, grid, block, shared_bytes, device, stream, slots);
}

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::int64_t>;

sstmerge::Dtype dtype_named(const std::string& name) {
    if (name == "float16") return sstmerge::Dtype::kFloat16;
    if (name == "bfloat16") return sstmerge::Dtype::kBfloat16;
    if (name == "float32") return sstmerge::Dtype::kFloat32;
    if (name == "float64") return sstmerge::Dtype::kFloat64;
    throw std::invalid_argument("there is no code for tensors of dtype " + name);
}

sstmerge::TensorList tensor_list(const Addresses& values, const Addresses& outputs, const Sizes& sizes,
                                 std::size_t tasks, int num_threads) {
    require(outputs.size() == sizes.size() && values.size() == tasks * sizes.size(),
            "the lists of addresses and sizes differ in length");
    require(num_threads >= 1, "num_threads must be at least 1");
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::int64_t size = sizes[i % sizes.size()];
        require(size >= 0, "the size of a tensor must not be negative");
        require(size == 0 || (values[i] && outputs[i % sizes.size()]), "an address is null");
    }
    sstmerge::TensorList tensors;
    for (std::uintptr_t address : values) tensors.values.push_back(reinterpret_cast<const void*>(address));
    for (std::uintptr_t address : outputs) tensors.outputs.push_back(reinterpret_cast<void*>(address));
    tensors.sizes = sizes;
    return tensors;
}

void require_counts(const Sizes& kept, const Sizes& sizes) {
    require(kept.size() == sizes.size(), "the lists of sizes and counts differ in length");
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        require(kept[i] >= 0 && kept[i] <= sizes[i], "a count must be between 0 and the size of its tensor");
    }
}

void magnitude_prune(const std::string& dtype, const Addresses& values, const Addresses& outputs, const Sizes& sizes,
                     const Sizes& kept, int num_threads) {
    const py::gil_scoped_release without_lock;
    const sstmerge::TensorList tensors = tensor_list(values, outputs, sizes, 1, num_threads);
    require_counts(kept, sizes);
    sstmerge::magnitude_prune(dtype_named(dtype), tensors, kept, num_threads);
}

void dare(const std::string& dtype, const Addresses& values, const Addresses& outputs, const Sizes& sizes,
          std::uint64_t seed, std::uint64_t first_stream, std::uint64_t keep_below, double scale, int num_threads) {
    const py::gil_scoped_release without_lock;
    require(keep_below >= 1 && keep_below <= std::uint64_t{1} << 32, "keep_below must be between 1 and 2^32");
    sstmerge::dare(dtype_named(dtype), tensor_list(values, outputs, sizes, 1, num_threads), seed, first_stream,
                   keep_below, scale, num_threads);
}

void ties(const std::string& dtype, const Addresses& values, const Addresses& outputs, const Sizes& sizes,
          const Sizes& kept, const std::vector<double>& weights, bool by_frequency, int num_threads) {
    const py::gil_scoped_release without_lock;
    require(!weights.empty(), "there are no weights");
    const sstmerge::TensorList tensors = tensor_list(values, outputs, sizes, weights.size(), num_threads);
    require_counts(kept, sizes);
    sstmerge::ties(dtype_named(dtype), tensors, kept, weights,
                   by_frequency ? sstmerge::MajoritySign::kFrequency : sstmerge::MajoritySign::kTotal, num_threads);
}

template <typename Value>
Value* pointer(std::uintptr_t address) {
    return reinterpret_cast<Value*>(address);
}

void torch_dare(const std::string& dtype, std::uintptr_t values, std::uintptr_t output, std::int64_t size,
                double probability, double density, std::uintptr_t generator_state) {
    const py::gil_scoped_release without_lock;
    require(size >= 0, "the size of a tensor must not be negative");
    require(generator_state != 0 && (size == 0 || (values && output)), "an address is null");
    require(probability >= 0 && probability <= 1, "the probability must be between 0 and 1");
    require(sstmerge::is_valid(*pointer<sstmerge::TorchGeneratorState>(generator_state)),
            "these bytes are not the state of torch's CPU generator");
    sstmerge::torch_dare(dtype_named(dtype), pointer<const void>(values), pointer<void>(output), size, probability,
                         density, pointer<sstmerge::TorchGeneratorState>(generator_state));
}

// The calls of cuSOLVER and cuBLAS are there for both types; Python says which by a flag.
template <typename Function>
auto with_scalar(bool is_float64, Function function) {
    return is_float64 ? function(double{}) : function(float{});
}

int cusolver_sygvd_workspace(int library, int device, std::uintptr_t stream, bool is_float64, std::uintptr_t a,
                             std::uintptr_t b, std::uintptr_t eigenvalues, int n) {
    return with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        return sstmerge::cusolver::sygvd_workspace<Scalar>({library, device, stream}, pointer<Scalar>(a),
                                                           pointer<Scalar>(b), pointer<Scalar>(eigenvalues), n);
    });
}

void cusolver_sygvd(int library, int device, std::uintptr_t stream, bool is_float64, std::uintptr_t a, std::uintptr_t b,
                    std::uintptr_t eigenvalues, std::uintptr_t workspace, int workspace_size, std::uintptr_t info,
                    int n, int batch) {
    with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        sstmerge::cusolver::sygvd<Scalar>({library, device, stream}, pointer<Scalar>(a), pointer<Scalar>(b),
                                          pointer<Scalar>(eigenvalues), pointer<Scalar>(workspace), workspace_size,
                                          pointer<int>(info), n, batch);
    });
}

void cusolver_potrf_batched(int library, int device, std::uintptr_t stream, bool is_float64, std::uintptr_t matrices,
                            std::uintptr_t info, int n, int batch) {
    with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        sstmerge::cusolver::potrf_batched<Scalar>({library, device, stream}, pointer<Scalar*>(matrices),
                                                  pointer<int>(info), n, batch);
    });
}

void cusolver_trsm_batched(int library, int device, std::uintptr_t stream, bool is_float64, const std::string& solve,
                           std::uintptr_t factors, std::uintptr_t matrices, int n, int batch) {
    using sstmerge::cusolver::Solve;
    if (solve != "forward" && solve != "from the right" && solve != "backward") {
        throw std::invalid_argument("there is no triangular solve '" + solve + "'");
    }
    const Solve which = solve == "forward"    ? Solve::kForward
                        : solve == "backward" ? Solve::kBackward
                                              : Solve::kFromTheRight;
    with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        sstmerge::cusolver::trsm_batched<Scalar>({library, device, stream}, which, pointer<const Scalar*>(factors),
                                                 pointer<Scalar*>(matrices), n, batch);
    });
}

std::pair<std::size_t, std::size_t> cusolver_syev_batched_workspace(int library, int device, std::uintptr_t stream,
                                                                    bool is_float64, std::uintptr_t matrices,
                                                                    std::uintptr_t eigenvalues, int n, int batch) {
    return with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        return sstmerge::cusolver::syev_batched_workspace<Scalar>({library, device, stream}, pointer<Scalar>(matrices),
                                                                  pointer<Scalar>(eigenvalues), n, batch);
    });
}

void cusolver_syev_batched(int library, int device, std::uintptr_t stream, bool is_float64, std::uintptr_t matrices,
                           std::uintptr_t eigenvalues, std::uintptr_t device_workspace, std::size_t device_bytes,
                           std::uintptr_t host_workspace, std::size_t host_bytes, std::uintptr_t info, int n,
                           int batch) {
    with_scalar(is_float64, [&](auto scalar) {
        using Scalar = decltype(scalar);
        sstmerge::cusolver::syev_batched<Scalar>({library, device, stream}, pointer<Scalar>(matrices),
                                                 pointer<Scalar>(eigenvalues), pointer<void>(device_workspace),
                                                 device_bytes, pointer<void>(host_workspace), host_bytes,
                                                 pointer<int>(info), n, batch);
    });
}

void define_cusolver(py::module_& module) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    module.def("cusolver_open", &sstmerge::cusolver::open, "candidates"_a, Unlocked());
    module.def("cusolver_path", &sstmerge::cusolver::path, "library"_a);
    module.def("cusolver_has_syev_batched", &sstmerge::cusolver::has_syev_batched, "library"_a);
    module.def("cusolver_sygvd_workspace", &cusolver_sygvd_workspace, "library"_a, "device"_a, "stream"_a,
               "is_float64"_a, "a"_a, "b"_a, "eigenvalues"_a, "n"_a, Unlocked());
    module.def("cusolver_sygvd", &cusolver_sygvd, "library"_a, "device"_a, "stream"_a, "is_float64"_a, "a"_a, "b"_a,
               "eigenvalues"_a, "workspace"_a, "workspace_size"_a, "info"_a, "n"_a, "batch"_a, Unlocked());
    module.def("cusolver_potrf_batched", &cusolver_potrf_batched, "library"_a, "device"_a, "stream"_a, "is_float64"_a,
               "matrices"_a, "info"_a, "n"_a, "batch"_a, Unlocked());
    module.def("cusolver_trsm_batched", &cusolver_trsm_batched, "library"_a, "device"_a, "stream"_a, "is_float64"_a,
               "solve"_a, "factors"_a, "matrices"_a, "n"_a, "batch"_a, Unlocked());
    module.def("cusolver_syev_batched_workspace", &cusolver_syev_batched_workspace, "library"_a, "device"_a, "stream"_a,
               "is_float64"_a, "matrices"_a, "eigenvalues"_a, "n"_a, "batch"_a, Unlocked());
    module.def("cusolver_syev_batched", &cusolver_syev_batched, "library"_a, "device"_a, "stream"_a, "is_float64"_a,
               "matrices"_a, "eigenvalues"_a, "device_workspace"_a, "device_bytes"_a, "host_workspace"_a,
               "host_bytes"_a, "info"_a, "n"_a, "batch"_a, Unlocked());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.attr("VERSION") = SSTMERGE_VERSION;
#ifdef _OPENMP
    module.attr("HAS_OPENMP") = true;
#else
    module.attr("HAS_OPENMP") = false;
#endif
    module.attr("CONVERGED") = static_cast<int>(sstmerge::SolveStatus::kConverged);
    module.attr("NOT_POSITIVE_DEFINITE") = static_cast<int>(sstmerge::SolveStatus::kNotPositiveDefinite);
    module.attr("NOT_CONVERGED") = static_cast<int>(sstmerge::SolveStatus::kNotConverged);
    module.attr("NON_FINITE_INPUT") = static_cast<int>(sstmerge::SolveStatus::kNonFiniteInput);
    module.def("cuda_build_reason", &sstmerge::cuda::build_reason);
    module.def("cuda_device_count", &sstmerge::cuda::device_count, py::call_guard<py::gil_scoped_release>());
    module.def("cuda_kernel_names", &sstmerge::cuda::kernel_names);
    module.def("cuda_kernel_attributes", &cuda_kernel_attributes, "name"_a, "device"_a);
    module.def("cuda_launch", &cuda_launch, "name"_a, "grid"_a, "block"_a, "shared_bytes"_a, "device"_a, "stream"_a,
               "arguments"_a);
    module.def("bind_lapack", &bind_lapack, "ssygvd"_a, "dsygvd"_a);
    define_generalized_eigh<float>(module, "generalized_eigh_float32");
    define_generalized_eigh<double>(module, "generalized_eigh_float64");
    define_cusolver(module);
    module.def("magnitude_prune", &magnitude_prune, "dtype"_a, "values"_a, "outputs"_a, "sizes"_a, "kept"_a,
               "num_threads"_a);
    module.def("dare", &dare, "dtype"_a, "values"_a, "outputs"_a, "sizes"_a, "seed"_a, "first_stream"_a, "keep_below"_a,
               "scale"_a, "num_threads"_a);
    module.def("torch_dare", &torch_dare, "dtype"_a, "values"_a, "output"_a, "size"_a, "probability"_a, "density"_a,
               "generator_state"_a);
    module.def("ties", &ties, "dtype"_a, "values"_a, "outputs"_a, "sizes"_a, "kept"_a, "weights"_a, "by_frequency"_a,
               "num_threads"_a);
}
