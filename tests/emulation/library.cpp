// The emulated kernels as a shared library: launches act on the memory of the process.
#include "launch.h"

extern "C" const char* emulated_launch(const char* kernel, const unsigned* grid, unsigned threads,
                                       std::size_t shared_bytes, int order, const unsigned char* slots,
                                       std::size_t count) {
    static std::string message;
    message = emulation::launch(kernel, {grid[0], grid[1], grid[2]}, threads, shared_bytes, order, slots, count);
    return message.c_str();
}
