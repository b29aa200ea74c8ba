// Emulated launches by name: the CPU's counterpart of csrc/cuda/runtime.cu, from the same lists of kernels.
#pragma once

#include <map>
#include <utility>

#include "emulation.h"

namespace emulation {

using Launch = std::function<void(Index grid, unsigned threads, std::size_t shared_bytes, int order,
                                  const unsigned char* slots, std::size_t count)>;

template <typename Parameter>
Parameter read_slot(const unsigned char* slots, std::size_t number) {
    Parameter value;
    std::memcpy(&value, slots + 8 * number, sizeof value);
    return value;
}

template <typename... Parameters, std::size_t... Numbers>
Launch make_launch(void (*kernel)(Parameters...), std::index_sequence<Numbers...>) {
    return [kernel](Index grid, unsigned threads, std::size_t shared_bytes, int order, const unsigned char* slots,
                    std::size_t count) {
        if (count != sizeof...(Parameters)) {
            throw std::runtime_error("the kernel takes " + std::to_string(sizeof...(Parameters)) + " arguments, not " +
                                     std::to_string(count));
        }
        run_grid(grid, threads, shared_bytes, order,
                 [&] { kernel(read_slot<std::remove_cv_t<std::remove_reference_t<Parameters>>>(slots, Numbers)...); });
    };
}

template <typename... Parameters>
Launch make_launch(void (*kernel)(Parameters...)) {
    return make_launch(kernel, std::index_sequence_for<Parameters...>());
}

// Defined by the file that compiling.py writes from the lists of kernels.
const std::map<std::string, Launch>& launches();

// Returns an empty string, or what went wrong.
inline std::string launch(const std::string& kernel, Index grid, unsigned threads, std::size_t shared_bytes, int order,
                          const unsigned char* slots, std::size_t count) {
    try {
        launches().at(kernel)(grid, threads, shared_bytes, order, slots, count);
        return "";
    } catch (const std::out_of_range&) {
        return "there is no kernel " + kernel;
    } catch (const std::exception& error) {
        return kernel + ": " + error.what();
    }
}

}  // namespace emulation

#define EMULATION_ENTRY(kernel) {#kernel, emulation::make_launch(kernel)},
