// A TensorRT that runs on the host: the real interfaces of the headers, and behind them the little that engines/runtime
// calls. Whatever else is called ends the program (stubs.h, written by the test from the headers).
//
// A plan is text, one tensor a line: "input x float32 2,64", or "output y float32 2,32 host". An inference writes
// 2 * x + 1 to every float32 output, x being the first input, over and over.
//
// FAKE_TENSORRT: the version it says (10.14.1.48). FAKE_TENSORRT_FAIL: a step that fails.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "stubs.h"

using namespace nvinfer1;

namespace {

ILogger* gLogger = nullptr;

void note(std::string const& what) {
    char const* const path = std::getenv("FAKE_LOG");
    if (path == nullptr) return;
    FILE* const file = std::fopen(path, "a");
    std::fprintf(file, "%s\n", what.c_str());
    std::fclose(file);
}

bool fails(char const* step) {
    char const* const wanted = std::getenv("FAKE_TENSORRT_FAIL");
    if (wanted == nullptr || std::strcmp(wanted, step) != 0) return false;
    gLogger->log(ILogger::Severity::kERROR, "[stub] no\nluck");
    return true;
}

int32_t versionPart(int32_t index) {
    char const* const text = std::getenv("FAKE_TENSORRT");
    std::istringstream parts(text != nullptr ? text : "10.14.1.48");
    std::string part;
    for (int32_t i = 0; i <= index; ++i) std::getline(parts, part, '.');
    return std::atoi(part.c_str());
}

struct Slot {
    std::string name;
    DataType type{};
    Dims dims{};
    TensorIOMode mode = TensorIOMode::kNONE;
    std::string options;

    int64_t count() const {
        int64_t all = 1;
        for (int32_t i = 0; i < dims.nbDims; ++i) all *= dims.d[i];
        return all;
    }
};

using Slots = std::vector<Slot>;

Slot const& slotOf(Slots const& slots, char const* name) {
    static Slot const none;
    for (Slot const& slot : slots) {
        if (slot.name == name) return slot;
    }
    return none;
}

class Context : public IExecutionContext {
public:
    explicit Context(Slots const& slots) : mOwn(slots) { mImpl = &mOwn; }

private:
    struct Own : stubs::VExecutionContext {
        explicit Own(Slots const& slots) : slots(slots) {}
        bool setTensorAddress(char const* name, void* data) noexcept override {
            if (fails("address") || slotOf(slots, name).mode == TensorIOMode::kNONE) return false;
            addresses[name] = data;
            return true;
        }
        bool enqueueV3(cudaStream_t stream) noexcept override {
            if (fails("enqueue")) return false;
            note("enqueued");
            void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
            auto const launch = reinterpret_cast<void (*)(void*, void (*)(void*), void*)>(dlsym(driver, "fakeLaunch"));
            launch(stream, [](void* self) { static_cast<Own*>(self)->work(); }, this);
            return true;
        }
        void work() {
            note("worked");
            Slot const& from = slots.front();
            auto const* const x = static_cast<float const*>(addresses[from.name]);
            for (Slot const& to : slots) {
                if (to.mode != TensorIOMode::kOUTPUT || to.type != DataType::kFLOAT) continue;
                auto* const y = static_cast<float*>(addresses[to.name]);
                for (int64_t i = 0; i < to.count(); ++i) y[i] = 2.0F * x[i % from.count()] + 1.0F;
            }
        }
        Slots const& slots;
        std::map<std::string, void*> addresses;
    };
    Own mOwn;
};

class Engine : public ICudaEngine {
public:
    explicit Engine(Slots slots) : mOwn(std::move(slots)) { mImpl = &mOwn; }

private:
    struct Own : stubs::VCudaEngine {
        explicit Own(Slots slots) : slots(std::move(slots)) {}
        int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(slots.size()); }
        Dims getTensorShape(char const* name) const noexcept override { return slotOf(slots, name).dims; }
        DataType getTensorDataType(char const* name) const noexcept override { return slotOf(slots, name).type; }
        TensorIOMode getTensorIOMode(char const* name) const noexcept override { return slotOf(slots, name).mode; }
        TensorLocation getTensorLocation(char const* name) const noexcept override {
            return slotOf(slots, name).options == "host" ? TensorLocation::kHOST : TensorLocation::kDEVICE;
        }
        TensorFormat getTensorFormat(char const* name) const noexcept override {
            return slotOf(slots, name).options == "chw32" ? TensorFormat::kCHW32 : TensorFormat::kLINEAR;
        }
        IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
            return fails("context") ? nullptr : new Context(slots);
        }
        Slots slots;
    };
    Own mOwn;
};

class Registry : public stubs::IPluginRegistry {
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
        if (fails("plugin")) return nullptr;
        void* const library = dlopen(path, RTLD_NOW);
        auto const* const words = static_cast<char const*>(dlsym(library, "fake_creator"));
        if (words != nullptr) mCreator = words;
        note("loaded a plugin");
        return library;
    }
    void deregisterLibrary(PluginLibraryHandle) noexcept override { note("took a plugin out"); }
    IPluginCreatorInterface* getCreator(AsciiChar const* name, AsciiChar const* version,
                                        AsciiChar const* space) noexcept override {
        bool const known = mCreator == std::string(space) + "::" + name + " " + version;
        return known ? reinterpret_cast<IPluginCreatorInterface*>(this) : nullptr;
    }

private:
    std::string mCreator;
};

class Runtime : public IRuntime {
public:
    Runtime() { mImpl = &mOwn; }

private:
    struct Own : stubs::VRuntime {
        IPluginRegistry& getPluginRegistry() noexcept override { return registry; }
        ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
            note("deserialised");
            gLogger->log(ILogger::Severity::kWARNING, "a warning of the stub");
            if (fails("deserialise")) return nullptr;
            static std::map<std::string, DataType> const types{
                {"float32", DataType::kFLOAT}, {"float16", DataType::kHALF}, {"int64", DataType::kINT64},
                {"int32", DataType::kINT32},   {"bool", DataType::kBOOL},    {"int4", DataType::kINT4}};
            std::istringstream lines(std::string(static_cast<char const*>(blob), size));
            std::string line, mode, type, shape;
            Slots slots;
            while (std::getline(lines, line)) {
                Slot slot;
                std::istringstream(line) >> mode >> slot.name >> type >> shape >> slot.options;
                slot.mode = mode == "input" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
                slot.type = types.at(type);
                std::istringstream sizes(shape);
                for (std::string part; std::getline(sizes, part, ',');) {
                    slot.dims.d[slot.dims.nbDims++] = std::stol(part);
                }
                slots.push_back(slot);
            }
            return new Engine(std::move(slots));
        }
        Registry registry;
    };
    Own mOwn;
};

} // namespace

extern "C" {
int32_t getInferLibMajorVersion() noexcept { return versionPart(0); }
int32_t getInferLibMinorVersion() noexcept { return versionPart(1); }
int32_t getInferLibPatchVersion() noexcept { return versionPart(2); }
int32_t getInferLibBuildVersion() noexcept { return versionPart(3); }
int32_t getInferLibVersion() noexcept { return versionPart(0) * 10000 + versionPart(1) * 100 + versionPart(2); }
void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
    gLogger = static_cast<ILogger*>(logger);
    note("runtime");
    return fails("runtime") ? nullptr : static_cast<IRuntime*>(new Runtime);
}
}
