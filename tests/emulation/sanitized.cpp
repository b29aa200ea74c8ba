// The emulated kernels as a program for the sanitizers: one launch, read from standard input. Every buffer gets memory
// of its own of exactly its size, so that a step beyond it is caught.
//
// Input: words of 8 bytes, then bytes. (length, name), grid x, y, z, threads, shared bytes, order, count of buffers,
// per buffer (size, content), count of slots, per slot (index of its buffer or -1, value or offset into the buffer).
// Output: the contents of the buffers, one after another.
#include <cstdio>

#include "launch.h"

namespace {

void read_bytes(void* target, std::size_t count) {
    if (std::fread(target, 1, count, stdin) != count) std::abort();
}

std::int64_t read_word() {
    std::int64_t word;
    read_bytes(&word, sizeof word);
    return word;
}

}  // namespace

int main() {
    std::string name(read_word(), ' ');
    read_bytes(name.data(), name.size());
    emulation::Index grid;
    grid.x = static_cast<unsigned>(read_word());
    grid.y = static_cast<unsigned>(read_word());
    grid.z = static_cast<unsigned>(read_word());
    const auto threads = static_cast<unsigned>(read_word());
    const auto shared_bytes = static_cast<std::size_t>(read_word());
    const auto order = static_cast<int>(read_word());
    std::vector<std::unique_ptr<char, void (*)(void*)>> buffers;
    std::vector<std::size_t> sizes(read_word());
    for (std::size_t& size : sizes) {
        constexpr std::size_t kAlignment = 256;  // as cudaMalloc
        size = static_cast<std::size_t>(read_word());
        void* memory = nullptr;
        if (posix_memalign(&memory, kAlignment, size) != 0) std::abort();
        read_bytes(memory, size);
        buffers.emplace_back(static_cast<char*>(memory), std::free);
    }
    std::vector<std::uint64_t> slots(read_word());
    for (std::uint64_t& slot : slots) {
        const std::int64_t buffer = read_word(), value = read_word();
        slot = buffer < 0 ? static_cast<std::uint64_t>(value)
                          : reinterpret_cast<std::uintptr_t>(buffers[buffer].get() + value);
    }
    const std::string message = emulation::launch(name, grid, threads, shared_bytes, order,
                                                  reinterpret_cast<const unsigned char*>(slots.data()), slots.size());
    if (!message.empty()) {
        std::fprintf(stderr, "%s\n", message.c_str());
        return 1;
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) std::fwrite(buffers[i].get(), 1, sizes[i], stdout);
    return 0;
}
