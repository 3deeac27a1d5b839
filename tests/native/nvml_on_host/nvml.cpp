// A driver's NVML with GPUs that are written down here: enough of libnvidia-ml.so.1 for edgecomp.profiles.nvml.
//
// FAKE_NVML_GPUS: names of the GPUs, with ";" between ("NVIDIA Host A"). FAKE_NVML_FAIL: "name=code;name=code", calls
// that fail; "all=code" is every call of a device but its handle. FAKE_NVML_REASONS: the mask of throttle reasons (0).
// FAKE_NVML_MIG: 1 where MIG is on. FAKE_NVML_LOG: a file that gets a line for each start and end.
// Compiled with -DOLD it is a driver of before CUDA 12.2, which lacks the newer calls; with -DNEXT one of CUDA 14, which
// is to lack the older.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Gpu {
    unsigned index;
    std::string name;
};
std::vector<Gpu> gGpus;
Gpu gInstance{1000, "MIG"};
int gOpen = 0;

std::string setting(char const* name, char const* usual) {
    char const* const value = std::getenv(name);
    return value != nullptr ? value : usual;
}

int failure(std::string const& name) {
    std::string const wanted = ";" + setting("FAKE_NVML_FAIL", "") + ";";
    size_t const place = wanted.find(";" + name + "=");
    return place == std::string::npos ? 0 : std::atoi(wanted.c_str() + place + name.size() + 2);
}

int of(char const* name, void const* device) {
    if (gOpen <= 0) return 1; // uninitialized
    if (int const code = failure(name)) return code;
    if (int const code = failure("all")) return code;
    return device == nullptr || device == &gInstance ? 2 : 0; // invalid argument
}

void note(char const* what) {
    char const* const path = std::getenv("FAKE_NVML_LOG");
    if (path == nullptr) return;
    FILE* const file = std::fopen(path, "a");
    std::fprintf(file, "%s\n", what);
    std::fclose(file);
}

int text(std::string const& what, char* out, unsigned size) {
    if (what.size() + 1 > size) return 7;
    std::memcpy(out, what.c_str(), what.size() + 1);
    return 0;
}

} // namespace

#define DEVICE(name, ...)                       \
    extern "C" int name(void* device, __VA_ARGS__) { \
        if (int const code = of(#name, device)) return code;

extern "C" int nvmlInit_v2() {
    if (int const code = failure("nvmlInit_v2")) return code;
    gGpus.clear();
    std::string const names = setting("FAKE_NVML_GPUS", "NVIDIA Host A") + ";";
    for (size_t start = 0, end; (end = names.find(';', start)) != std::string::npos; start = end + 1)
        if (end > start) gGpus.push_back({static_cast<unsigned>(gGpus.size()), names.substr(start, end - start)});
    ++gOpen;
    note("open");
    return 0;
}
extern "C" int nvmlShutdown() { --gOpen; note("closed"); return 0; }
extern "C" char const* nvmlErrorString(int code) {
    switch (code) {
        case 3: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case 9: return "Driver Not Loaded";
        case 15: return "GPU is lost";
        case 18: return "Driver/library version mismatch";
        default: return "Unknown Error";
    }
}
extern "C" int nvmlSystemGetDriverVersion(char* out, unsigned size) { return text("580.65.06", out, size); }
extern "C" int nvmlDeviceGetCount_v2(unsigned* count) {
    *count = static_cast<unsigned>(gGpus.size());
    return failure("nvmlDeviceGetCount_v2");
}
extern "C" int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
    if (index >= gGpus.size()) return 2;
    *device = &gGpus[index];
    return 0;
}
extern "C" int nvmlDeviceGetHandleByUUID(char const* uuid, void** device) {
    if (std::strncmp(uuid, "MIG-aaaa", 8) != 0) return 6;
    *device = &gInstance;
    return 0;
}
extern "C" int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void* instance, void** device) {
    if (instance != &gInstance) return 2;
    *device = &gGpus.back();
    return 0;
}
extern "C" int nvmlDeviceGetIndex(void* device, unsigned* index) { *index = static_cast<Gpu*>(device)->index; return 0; }
extern "C" int nvmlDeviceGetUUID(void* device, char* out, unsigned size) {
    return text("GPU-" + std::to_string(static_cast<Gpu*>(device)->index) + "0000000-1111-2222-3333-444444444444", out, size);
}
extern "C" int nvmlDeviceGetName(void* device, char* out, unsigned size) {
    return text(static_cast<Gpu*>(device)->name, out, size);
}
DEVICE(nvmlDeviceGetCudaComputeCapability, int* major, int* minor) *major = 9; *minor = 0; return 0; }
DEVICE(nvmlDeviceGetClockInfo, int type, unsigned* mhz) *mhz = type == 0 ? 1755 : type == 1 ? 1740 : 2619; return 0; }
DEVICE(nvmlDeviceGetMaxClockInfo, int type, unsigned* mhz) *mhz = type == 2 ? 2619 : 1980; return 0; }
#ifdef NEXT
struct Heat { unsigned version; int sensor, celsius; };
DEVICE(nvmlDeviceGetTemperatureV, Heat* heat)
    if (heat->version != 0x100000C || heat->sensor != 0) return 25;
    heat->celsius = 61;
    return 0;
}
#else
DEVICE(nvmlDeviceGetTemperature, int, unsigned* celsius) *celsius = 61; return 0; }
#endif
DEVICE(nvmlDeviceGetTemperatureThreshold, int type, unsigned* celsius) *celsius = type == 1 ? 89 : 87; return 0; }
DEVICE(nvmlDeviceGetPowerUsage, unsigned* milliwatts) *milliwatts = 312345; return 0; }
DEVICE(nvmlDeviceGetEnforcedPowerLimit, unsigned* milliwatts) *milliwatts = 700000; return 0; }
DEVICE(nvmlDeviceGetTotalEnergyConsumption, unsigned long long* millijoules)
    static unsigned long long counter = 5000000000ULL; // beyond 32 bits
    *millijoules = counter += 1000;
    return 0;
}
DEVICE(nvmlDeviceGetUtilizationRates, unsigned* rates) rates[0] = 97; rates[1] = 40; return 0; }
DEVICE(nvmlDeviceGetMemoryInfo, unsigned long long* memory)
    memory[0] = 150754820096ULL; memory[1] = 150754820096ULL - (3ULL << 30); memory[2] = 3ULL << 30;
    return 0;
}
DEVICE(nvmlDeviceGetComputeRunningProcesses_v3, unsigned* count, void*)
    *count = 2;
    return 7; // there is no room for them
}
DEVICE(nvmlDeviceGetPersistenceMode, int* mode) *mode = 1; return 0; }
DEVICE(nvmlDeviceGetMigMode, unsigned* current, unsigned* pending)
    *current = *pending = static_cast<unsigned>(std::atoi(setting("FAKE_NVML_MIG", "0").c_str()));
    return 0;
}
#ifdef OLD
DEVICE(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long* mask)
    *mask = std::strtoull(setting("FAKE_NVML_REASONS", "0").c_str(), nullptr, 0);
    return 0;
}
#else
DEVICE(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long* mask)
    *mask = std::strtoull(setting("FAKE_NVML_REASONS", "0").c_str(), nullptr, 0);
    return 0;
}
struct Margin { unsigned version; int celsius; };
DEVICE(nvmlDeviceGetMarginTemperature, Margin* margin)
    if (margin->version != (sizeof(Margin) | 1U << 24)) return 25;
    margin->celsius = 26;
    return 0;
}
struct Field {
    unsigned id, scope;
    long long timestamp, latency;
    int type, code;
    union { double d; unsigned u; unsigned long long l; } value;
};
DEVICE(nvmlDeviceGetFieldValues, int count, Field* fields)
    for (int i = 0; i < count; ++i) {
        fields[i].code = fields[i].id == 186 ? failure("instant") : 3;
        fields[i].type = 1;
        fields[i].value.u = 298765;
    }
    return 0;
}
#endif
