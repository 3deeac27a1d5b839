// A driver of CUDA whose GPU is the host's memory: enough of libcuda.so.1 for engines/runtime, strict about pointers.
//
// FAKE_GPUS: how many (1). FAKE_SM: their compute capability (86). FAKE_CUDA_FAIL: "name code", a call that fails.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

struct Stream {
    bool isRecording = false;
    std::vector<std::function<void()>> recorded;
};

using Graph = std::vector<std::function<void()>>;

std::map<unsigned long long, size_t> gBlocks;
std::atomic<int> gContexts{0};
std::atomic<int> gRetained{0};

char const* setting(char const* name, char const* usual) {
    char const* const value = std::getenv(name);
    return value != nullptr ? value : usual;
}

int failure(char const* name) {
    std::string const wanted = setting("FAKE_CUDA_FAIL", "");
    size_t const space = wanted.find(' ');
    return space != std::string::npos && wanted.substr(0, space) == name ? std::atoi(wanted.c_str() + space + 1) : 0;
}

bool isInside(unsigned long long pointer, size_t size) {
    auto block = gBlocks.upper_bound(pointer);
    if (block == gBlocks.begin()) return false;
    --block;
    return pointer >= block->first && pointer + size <= block->first + block->second;
}

void note(char const* what) {
    char const* const path = std::getenv("FAKE_LOG");
    if (path == nullptr) return;
    FILE* const file = std::fopen(path, "a");
    std::fprintf(file, "%s\n", what);
    std::fclose(file);
}

} // namespace

#define CALL(name, ...)                               \
    extern "C" int name(__VA_ARGS__) {                \
        if (int const code = failure(#name)) return code;
#define END \
    return 0; \
    }

// Runs work in the order of a stream; what a recording stream gets waits for its graph.
extern "C" void fakeLaunch(void* stream, void (*work)(void*), void* argument) {
    auto* const to = static_cast<Stream*>(stream);
    if (to->isRecording) {
        to->recorded.push_back([=] { work(argument); });
    } else {
        work(argument);
    }
}

CALL(cuInit, unsigned) return std::atoi(setting("FAKE_GPUS", "1")) > 0 ? 0 : 100; }
extern "C" int cuGetErrorName(int code, char const** name) {
    *name = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 999 ? "CUDA_ERROR_UNKNOWN" : nullptr;
    return *name != nullptr ? 0 : 1;
}
CALL(cuDeviceGetCount, int* count) *count = std::atoi(setting("FAKE_GPUS", "1")); END
CALL(cuDeviceGet, int* device, int number) *device = number; END
CALL(cuDeviceGetName, char* name, int size, int) std::snprintf(name, size, "Host \x1b[31mGPU"); END
CALL(cuDeviceGetAttribute, int* value, int attribute, int)
    int const sm = std::atoi(setting("FAKE_SM", "86"));
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? sm / 10 : sm % 10;
END
CALL(cuDevicePrimaryCtxRetain, void** context, int) *context = &gContexts; ++gRetained; END
CALL(cuDevicePrimaryCtxRelease_v2, int)
    if (gContexts != 0 || --gRetained < 0 || (gRetained == 0 && !gBlocks.empty())) std::abort();
    note("released");
END
CALL(cuCtxPushCurrent_v2, void*) ++gContexts; END
CALL(cuCtxPopCurrent_v2, void** context) *context = &gContexts; if (--gContexts < 0) std::abort(); END
CALL(cuMemAlloc_v2, unsigned long long* pointer, size_t size)
    *pointer = reinterpret_cast<unsigned long long>(std::malloc(size));
    std::memset(reinterpret_cast<void*>(*pointer), 0xFF, size);
    gBlocks[*pointer] = size;
END
CALL(cuMemFree_v2, unsigned long long pointer)
    if (gBlocks.erase(pointer) != 1) std::abort();
    std::free(reinterpret_cast<void*>(pointer));
END
CALL(cuMemsetD8Async, unsigned long long pointer, unsigned char value, size_t size, void*)
    if (!isInside(pointer, size)) std::abort();
    std::memset(reinterpret_cast<void*>(pointer), value, size);
END
CALL(cuMemcpyHtoDAsync_v2, unsigned long long pointer, void const* from, size_t size, void*)
    if (!isInside(pointer, size)) std::abort();
    std::memcpy(reinterpret_cast<void*>(pointer), from, size);
END
CALL(cuMemcpyDtoHAsync_v2, void* to, unsigned long long pointer, size_t size, void*)
    if (!isInside(pointer, size)) std::abort();
    std::memcpy(to, reinterpret_cast<void*>(pointer), size);
END
CALL(cuStreamCreate, void** stream, unsigned) *stream = new Stream; END
CALL(cuStreamDestroy_v2, void* stream) delete static_cast<Stream*>(stream); END
CALL(cuStreamSynchronize, void* stream) if (static_cast<Stream*>(stream)->isRecording) return 900; END
CALL(cuEventCreate, void** event, unsigned) *event = new int; END
CALL(cuEventDestroy_v2, void* event) delete static_cast<int*>(event); END
CALL(cuEventRecord, void*, void*) END
CALL(cuEventElapsedTime, float* milliseconds, void*, void*) *milliseconds = 0.25F; END
CALL(cuStreamBeginCapture_v2, void* stream, int) static_cast<Stream*>(stream)->isRecording = true; END
extern "C" int cuStreamEndCapture(void* stream, void** graph) {
    auto* const from = static_cast<Stream*>(stream);
    from->isRecording = false;
    if (int const code = failure("cuStreamEndCapture")) return code;
    *graph = new Graph(std::move(from->recorded));
    note("recorded");
    return 0;
}
CALL(cuGraphInstantiateWithFlags, void** made, void* graph, unsigned long long)
    *made = new Graph(*static_cast<Graph*>(graph));
END
CALL(cuGraphLaunch, void* graph, void*)
    note("replayed");
    for (auto const& work : *static_cast<Graph*>(graph)) work();
END
CALL(cuGraphExecDestroy, void* graph) delete static_cast<Graph*>(graph); END
CALL(cuGraphDestroy, void* graph) delete static_cast<Graph*>(graph); END
