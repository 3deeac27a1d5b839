// Enough of CUDA to run the kernels of this repository on a CPU, for tests where there is no GPU.
//
// A thread of a block is a fibre; blocks run one after the other. Within a block one warp after the other, in shuffled
// order, runs as far as it can before the next may start, so that a missing barrier changes the result. Shared memory
// behind what a launch asked for is off limits under AddressSanitizer.
#ifndef CUDA_ON_HOST_CUDA_RUNTIME_H
#define CUDA_ON_HOST_CUDA_RUNTIME_H

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) static_cast<void>(0)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid configuration argument" : "no error"; }

constexpr size_t kMostShared = 48 << 10;  // what every GPU gives without being asked
extern unsigned char edgecomp_shared[];

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

struct Barrier {
    int arrived = 0;
    int generation = 0;
};

struct Block {
    std::vector<ucontext_t> fibres;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::vector<char> done;
    std::vector<char> waits;  // at a barrier of the block, at which a warp alone gets no further
    ucontext_t scheduler;
    int current = 0;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots;
    const std::function<void()>* body = nullptr;
};

inline Block block;
inline std::mt19937 order{1};

inline void yield() {
    const int mine = block.current;
    swapcontext(&block.fibres[mine], &block.scheduler);
    threadIdx.x = mine;
}

inline void wait(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    const int mine = block.current;
    while (barrier.generation == generation) {
        block.waits[mine] = &barrier == &block.all;
        yield();
    }
    block.waits[mine] = 0;
}

inline void enter() {
    (*block.body)();
    block.done[block.current] = 1;
    swapcontext(&block.fibres[block.current], &block.scheduler);
}

inline void prepare(int thread, size_t stack) {
    ucontext_t& fibre = block.fibres[thread];
    getcontext(&fibre);
    fibre.uc_stack.ss_sp = block.stacks[thread].get();
    fibre.uc_stack.ss_size = stack;
    fibre.uc_link = nullptr;
    makecontext(&fibre, enter, 0);
}

inline void run_block(int threads, const std::function<void()>& body) {
    constexpr size_t kStack = 64 << 10;
    block.fibres.resize(threads);
    while (static_cast<int>(block.stacks.size()) < threads) block.stacks.emplace_back(new char[kStack]);
    block.done.assign(threads, 0);
    block.all = {};
    block.warps.assign((threads + 31) / 32, {});
    block.slots.assign(threads, 0);
    block.body = &body;
    block.waits.assign(threads, 0);
    std::vector<int> warps(threads / 32);
    for (int i = 0; i < threads; ++i) prepare(i, kStack);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
    std::shuffle(warps.begin(), warps.end(), order);
    while (std::find(block.done.begin(), block.done.end(), 0) != block.done.end()) {
        for (const int warp : warps) {
            for (bool moves = true; moves;) {
                moves = false;
                for (int i = warp * 32; i < warp * 32 + 32; ++i) {
                    if (block.done[i]) continue;
                    block.current = i;
                    threadIdx = dim3(i, 0, 0);
                    swapcontext(&block.scheduler, &block.fibres[i]);
                    moves = moves || (!block.done[i] && !block.waits[i]);
                }
            }
        }
    }
}

template <typename T>
T shuffle_xor(T value, int lanes) {
    const int mine = block.current;
    Barrier& warp = block.warps[mine / 32];
    std::memcpy(&block.slots[mine], &value, sizeof(T));
    wait(warp, 32);
    std::memcpy(&value, &block.slots[mine ^ lanes], sizeof(T));
    wait(warp, 32);
    return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block.all, static_cast<int>(blockDim.x)); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return cuda_on_host::shuffle_xor(value, lanes);
}

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
    const dim3 grid = config->gridDim;
    const int threads = static_cast<int>(config->blockDim.x);
    if (config->dynamicSmemBytes > kMostShared || threads % 32 != 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535) {
        return cudaErrorInvalidConfiguration;
    }
    ASAN_UNPOISON_MEMORY_REGION(edgecomp_shared, kMostShared);
    std::memset(edgecomp_shared, 0xFF, kMostShared);  // NaN, so that reading before writing shows
    ASAN_POISON_MEMORY_REGION(edgecomp_shared + config->dynamicSmemBytes, kMostShared - config->dynamicSmemBytes);
    blockDim = config->blockDim;
    gridDim = grid;
    const std::function<void()> body = [&] { kernel(given...); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                cuda_on_host::run_block(threads, body);
            }
        }
    }
    return cudaSuccess;
}

#endif
