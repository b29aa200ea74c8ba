// The Python module sstmerge._C, a table of contents. sstmerge.ops validates, allocates, passes addresses and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>

#include "build_info.h"  // written by setup.py
#include "cuda/runtime.h"
#include "generalized_eigh.h"
#include "lapack.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

// scipy publishes a LAPACK routine as a capsule that holds the pointer and is named by the C signature.
void bind_lapack(const py::capsule& ssygvd, const py::capsule& dsygvd) {
    sstmerge::bind_sygvd<float>(ssygvd.get_pointer(), ssygvd.name());
    sstmerge::bind_sygvd<double>(dsygvd.get_pointer(), dsygvd.name());
}

template <typename Scalar>
void generalized_eigh(std::uintptr_t a, std::int64_t a_batch_stride, std::int64_t a_row_stride, std::uintptr_t b,
                      std::int64_t b_batch_stride, std::int64_t b_row_stride, std::uintptr_t eigenvalues,
                      std::uintptr_t eigenvectors, std::uintptr_t status, std::int64_t batch, int n, int num_threads) {
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
}
