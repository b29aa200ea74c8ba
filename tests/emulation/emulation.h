// The words of csrc/cuda/primitives.cuh on the CPU, so that g++ compiles the kernels' own sources and they can be
// proved right without a GPU.
//
// Every CUDA thread is a fiber. Blocks run one after another; between two barriers each warp runs alone as far as it
// can, and the order of warps, lanes and blocks is the caller's: a result that depends on it is a race. Shared memory
// holds NaN at first and is exactly as large as the launch said, so that an address sanitizer sees each step beyond it.
// Asynchronous copies land as late as they may: when their group is waited for. Not emulated: timing, bank conflicts,
// the rounding of tensor cores (products are summed in float, in order).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ inline  // so that kernels that nobody launches are not compiled
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 128 * 1024;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Copy {
    void* target;
    const void* source;
    int bytes;
};

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::kReady;
    std::vector<Copy> open_group;
    std::vector<std::vector<Copy>> groups;
    std::array<std::uint64_t, 8> mailbox;  // what the lanes of a warp give one another
};

struct Block {
    std::vector<Fiber> fibers;
    std::function<void()> body;
    ucontext_t scheduler;
    int current = -1;
    int vote = 0, vote_result = 0;
    unsigned char* shared = nullptr;
    std::exception_ptr error;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, block_size, grid_size;

inline Fiber& current() { return block->fibers[block->current]; }
inline Fiber& lane(int number) { return block->fibers[block->current / kWarp * kWarp + number]; }

inline void wait(State state) {
    Fiber& fiber = current();
    fiber.state = state;
    swapcontext(&fiber.context, &block->scheduler);
}

inline void warp_barrier() { wait(State::kAtWarpBarrier); }

// An exception cannot leave a fiber's stack, so it is handed to the scheduler.
inline void run_fiber() {
    try {
        block->body();
    } catch (...) {
        block->error = std::current_exception();
    }
    wait(State::kDone);
}

// Orders of threads: 0 forwards, 1 backwards, more: shuffled with this seed.
class Schedule {
  public:
    explicit Schedule(int order) : order_(order), random_(order) {}

    std::vector<int> permutation(int count) {
        std::vector<int> numbers(count);
        for (int i = 0; i < count; ++i) numbers[i] = order_ == 1 ? count - 1 - i : i;
        if (order_ > 1) std::shuffle(numbers.begin(), numbers.end(), random_);
        return numbers;
    }

  private:
    int order_;
    std::mt19937 random_;
};

inline void resume(int thread) {
    block->current = thread;
    thread_index.x = thread;
    swapcontext(&block->scheduler, &block->fibers[thread].context);
    if (block->error) std::rethrow_exception(block->error);
}

// Lets one warp run until each of its threads is at a block barrier or done. Returns whether any of them ran.
inline bool run_warp(int first, int last, Schedule& schedule) {
    bool ran = false;
    for (;;) {
        for (int offset : schedule.permutation(last - first)) {
            if (block->fibers[first + offset].state != State::kReady) continue;
            ran = true;
            resume(first + offset);
        }
        int waiting = 0;
        for (int i = first; i < last; ++i) waiting += block->fibers[i].state == State::kAtWarpBarrier;
        if (waiting == 0) return ran;
        if (waiting != last - first) throw std::runtime_error("a warp collective was reached by a part of its warp");
        for (int i = first; i < last; ++i) block->fibers[i].state = State::kReady;
    }
}

// Opens the block barrier once all threads are there. Returns whether the block is done.
inline bool open_barrier(bool ran) {
    int done = 0, waiting = 0;
    for (const Fiber& fiber : block->fibers) {
        done += fiber.state == State::kDone;
        waiting += fiber.state == State::kAtBarrier;
    }
    const int threads = static_cast<int>(block->fibers.size());
    if (done == threads) return true;
    if (done > 0 || waiting != threads || !ran)
        throw std::runtime_error("a block barrier was reached by a part of its block");
    block->vote_result = block->vote;
    block->vote = 0;
    for (Fiber& fiber : block->fibers) fiber.state = State::kReady;
    return false;
}

inline void run_block(unsigned threads, std::size_t shared_bytes, const std::function<void()>& body,
                      Schedule& schedule) {
    constexpr std::size_t kAlignment = 128;
    Block running;
    void* memory = nullptr;
    // malloc'd with the exact size: a sanitizer guards its end.
    if (posix_memalign(&memory, kAlignment, std::max<std::size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
    std::memset(memory, 0xFF, shared_bytes);  // NaN in every floating-point format
    running.shared = static_cast<unsigned char*>(memory);
    running.body = body;
    running.fibers = std::vector<Fiber>(threads);
    block = &running;
    for (Fiber& fiber : running.fibers) {
        fiber.stack.reset(new char[kStackBytes]);  // not make_unique, which would fill it with zeros
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    const int warps = static_cast<int>((threads + kWarp - 1) / kWarp);
    for (;;) {
        bool ran = false;
        for (int warp : schedule.permutation(warps)) {
            ran |= run_warp(warp * kWarp, std::min<int>(threads, (warp + 1) * kWarp), schedule);
        }
        if (open_barrier(ran)) break;
    }
    block = nullptr;
}

inline void run_grid(Index grid, unsigned threads, std::size_t shared_bytes, int order,
                     const std::function<void()>& body) {
    Schedule schedule(order);
    grid_size = grid;
    block_size = {threads, 1, 1};
    const int blocks = static_cast<int>(grid.x * grid.y * grid.z);
    for (int number : schedule.permutation(blocks)) {
        const unsigned n = number;
        block_index = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
        run_block(threads, shared_bytes, body, schedule);
    }
}

}  // namespace emulation

#define threadIdx (emulation::thread_index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define SSTMERGE_SHARED_MEMORY(name) unsigned char* name = emulation::block->shared

inline void __syncthreads() { emulation::wait(emulation::State::kAtBarrier); }
inline int __syncthreads_or(int predicate) {
    emulation::block->vote |= predicate != 0;
    emulation::wait(emulation::State::kAtBarrier);
    return emulation::block->vote_result;
}
inline void __syncwarp() { emulation::warp_barrier(); }

// Every lane of the warp takes part: partial masks are not emulated.
template <typename Value>
Value exchange(Value value, int source_lane) {
    static_assert(sizeof(Value) <= sizeof(std::uint64_t));
    std::memcpy(&emulation::current().mailbox[0], &value, sizeof(Value));
    emulation::warp_barrier();
    Value result;
    std::memcpy(&result, &emulation::lane(source_lane).mailbox[0], sizeof(Value));
    emulation::warp_barrier();
    return result;
}
template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    return exchange(value, (emulation::block->current % emulation::kWarp) ^ mask);
}
template <typename Value>
Value __shfl_sync(unsigned, Value value, int source_lane) {
    return exchange(value, source_lane);
}
template <typename Value>
Value __shfl_down_sync(unsigned, Value value, int delta) {
    const int lane = emulation::block->current % emulation::kWarp;
    return exchange(value, lane + delta < emulation::kWarp ? lane + delta : lane);
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
// Threads take turns, so that nothing comes between the load and the store.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    const unsigned before = *address;
    *address += value;
    return before;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}

namespace sstmerge::device {

using std::fabs;
using std::fma;
using std::fmax;
using std::fmin;
using std::ilogb;
using std::isfinite;
using std::ldexp;
using std::sqrt;

struct Bfloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
inline float to_float(Float16 value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                      : exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    return value.bits >> 15 ? -magnitude : magnitude;
}

template <typename Element>
Element round_to(float value);
template <>
inline float round_to<float>(float value) {
    return value;
}
template <>
inline Bfloat16 round_to<Bfloat16>(float value) {
    if (std::isnan(value)) return {0x7FFF};
    const unsigned bits = __float_as_uint(value);
    return {static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 round_to<Float16>(float value) {
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return {0x7FFF};
    if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7C00)};
    const int exponent = std::max(std::ilogb(std::max(magnitude, 6.103515625e-05f)), -14);
    // Steps of 2^(exponent - 10): a carry out of the fraction moves into the exponent by itself. Half to even by rint.
    const int steps = static_cast<int>(std::rint(std::ldexp(magnitude, 10 - exponent)));
    const int biased = steps >= 1024 ? (exponent + 14) * 1024 + steps : steps;
    return {static_cast<unsigned short>(sign | biased)};
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
    if (reinterpret_cast<std::uintptr_t>(shared) % 16 || reinterpret_cast<std::uintptr_t>(global) % 16) {
        throw std::runtime_error("an asynchronous copy is not aligned to 16 bytes");
    }
    emulation::current().open_group.push_back({shared, global, bytes});
}
inline void copy_async_commit() {
    emulation::Fiber& fiber = emulation::current();
    fiber.groups.push_back(std::move(fiber.open_group));
    fiber.open_group.clear();
}
template <int Pending>
void copy_async_wait() {
    std::vector<std::vector<emulation::Copy>>& groups = emulation::current().groups;
    while (groups.size() > Pending) {
        for (const emulation::Copy& copy : groups.front()) {
            std::memcpy(copy.target, copy.source, copy.bytes);
            std::memset(static_cast<char*>(copy.target) + copy.bytes, 0, 16 - copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

inline void load_matrices(unsigned (&fragment)[4], const void* row, bool transposed) {
    const int lane = emulation::block->current % emulation::kWarp;
    if (reinterpret_cast<std::uintptr_t>(row) % 16) throw std::runtime_error("a matrix row is not aligned to 16 bytes");
    emulation::current().mailbox[0] = reinterpret_cast<std::uintptr_t>(row);
    emulation::warp_barrier();
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned pair = 0;
        for (int half = 0; half < 2; ++half) {
            const int i = transposed ? lane % 4 * 2 + half : lane / 4, j = transposed ? lane / 4 : lane % 4 * 2 + half;
            std::uint16_t element;
            std::memcpy(&element, reinterpret_cast<const char*>(emulation::lane(matrix * 8 + i).mailbox[0]) + 2 * j, 2);
            pair |= static_cast<unsigned>(element) << (16 * half);
        }
        fragment[matrix] = pair;
    }
    emulation::warp_barrier();
}
inline void load_matrix_x4(unsigned (&fragment)[4], const void* row) { load_matrices(fragment, row, false); }
inline void load_matrix_x4_transposed(unsigned (&fragment)[4], const void* row) { load_matrices(fragment, row, true); }

template <typename Element>
void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const int lane = emulation::block->current % emulation::kWarp;
    auto& mailbox = emulation::current().mailbox;
    std::copy(a, a + 4, mailbox.begin());
    mailbox[4] = b0;
    mailbox[5] = b1;
    emulation::warp_barrier();
    for (int x = 0; x < 4; ++x) {
        const int row = lane / 4 + x / 2 * 8, column = lane % 4 * 2 + x % 2;
        for (int k = 0; k < 16; ++k) {
            // a(row, k) is with lane (row % 8) * 4 + (k % 8) / 2, b(k, column) with lane column * 4 + (k % 8) / 2.
            const auto pair_a = emulation::lane(row % 8 * 4 + k % 8 / 2).mailbox[row / 8 + k / 8 * 2];
            const auto pair_b = emulation::lane(column * 4 + k % 8 / 2).mailbox[4 + k / 8];
            c[x] += to_float(Element{static_cast<unsigned short>(pair_a >> (16 * (k % 2)))}) *
                    to_float(Element{static_cast<unsigned short>(pair_b >> (16 * (k % 2)))});
        }
    }
    emulation::warp_barrier();
}

}  // namespace sstmerge::device
