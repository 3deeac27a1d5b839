// Runs an engine that `edgecomp build` made, from C++ and without Python; README.md says how to use it.
//
// This header needs the standard library alone: TensorRT and CUDA stay inside edgecomp_runtime.cpp, which opens both
// libraries at run time. A program that uses it therefore starts on any machine, and says what is missing there.
//
// Nothing throws. What can fail returns a Status or a Result, and an Error says what is wrong with the value, where,
// and what to do. Sizes that come from files are bounded before memory is asked for; plans and tensors are allocated
// without throwing, and small strings and lists end the program when even they find no memory.
#ifndef EDGECOMP_RUNTIME_H
#define EDGECOMP_RUNTIME_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace edgecomp {

enum class Code : int32_t {
    kFILE,     // a file cannot be read or written
    kFORMAT,   // a file is not what it should be
    kMISMATCH, // the plan, its record, TensorRT, the plugin or the GPU do not belong together
    kLIBRARY,  // TensorRT or a plugin library does not load
    kDEVICE,   // there is no driver or no GPU, or CUDA failed
    kTENSOR,   // a tensor has another name, type or shape, or is missing
    kRUN,      // TensorRT refused the plan or the inference
    kMEMORY,   // not enough of it
};

struct Error {
    Code code{};
    std::string what;   // with the value
    std::string where;  // the file, library or tensor; may be empty
    std::string remedy; // what to do

    // "where: what; remedy", in one line.
    std::string text() const;
};

// Success, or an Error.
class [[nodiscard]] Status {
public:
    Status() = default;
    Status(Error error) : mError(std::move(error)) {}
    explicit operator bool() const noexcept { return !mError.has_value(); }
    Error const& error() const { return *mError; }

private:
    std::optional<Error> mError;
};

// A value, or an Error. Asking for the one that is not there ends the program.
template <class T>
class [[nodiscard]] Result {
public:
    Result(T value) : mValue(std::move(value)) {}
    Result(Error error) : mError(std::move(error)) {}
    explicit operator bool() const noexcept { return mValue.has_value(); }
    T& operator*() { return mValue ? *mValue : (std::abort(), *mValue); }
    T* operator->() { return &**this; }
    Error const& error() const { return mError ? *mError : (std::abort(), *mError); }

private:
    std::optional<T> mValue;
    std::optional<Error> mError;
};

enum class Type : int32_t {
    kFLOAT64,
    kFLOAT32,
    kFLOAT16,
    kBFLOAT16,
    kFLOAT8_E4M3,
    kINT64,
    kINT32,
    kINT16,
    kINT8,
    kUINT8,
    kBOOL,
};

// "float32", as the record and numpy have it.
char const* nameOf(Type type) noexcept;
size_t sizeOf(Type type) noexcept;

struct TensorInfo {
    std::string name;
    Type type{};
    std::vector<int64_t> shape;

    size_t bytes() const noexcept;
    // "float32 [1, 3, 64, 64]"
    std::string text() const;
};

// A block of memory on the host.
class Bytes {
public:
    static Result<Bytes> allocate(size_t size, std::string const& what);
    uint8_t* data() noexcept { return mData.get(); }
    uint8_t const* data() const noexcept { return mData.get(); }
    size_t size() const noexcept { return mSize; }

private:
    struct Free {
        void operator()(uint8_t* data) const noexcept { std::free(data); }
    };
    std::unique_ptr<uint8_t, Free> mData;
    size_t mSize = 0;
};

struct Tensor {
    TensorInfo info;
    Bytes data;
};

// -- files ----------------------------------------------------------------------------------------------------------

// Reads a safetensors file; the tensors come in the order of their data. Nothing in the file is trusted.
Result<std::vector<Tensor>> readSafetensors(std::string const& path) noexcept;

// Writes a file that is there whole or not at all.
Status writeSafetensors(std::string const& path, std::vector<Tensor> const& tensors) noexcept;

struct PluginRecord {
    std::string name;
    std::string op;
    std::string version;
    std::string library;  // file name of the copy beside the plan
    std::string sha256;
    std::vector<int64_t> sm;
    std::string tensorrt; // version of the headers that it was compiled with
};

// What the JSON file beside a plan says, as far as it matters for running; other fields are left unread.
struct Record {
    std::string path;
    std::string model;
    std::string target;
    std::string runtime; // "tensorrt" or "rtx"
    std::string runtimeVersion;
    std::string precision;
    std::string sha256;
    int64_t sizeBytes = 0;
    std::vector<int64_t> sm;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
    std::vector<PluginRecord> plugins;
};

// Reads the record beside a plan (`x.json` for `x.engine`); does not read the plan.
Result<Record> readRecord(std::string const& plan) noexcept;

// Reads the record, and the plan against it: size and sha256. Needs neither TensorRT nor a GPU.
Result<Record> checkPlan(std::string const& plan) noexcept;

// -- engines --------------------------------------------------------------------------------------------------------

using LogFunction = void (*)(char const* text, void* user);

struct Options {
    std::string tensorrt;             // TensorRT's library; "": the usual names of the flavour that the record names
    std::vector<std::string> plugins; // plugin libraries; none is loaded that is not named here, whatever a file says
    int32_t device = 0;               // number of the GPU
    bool cudaGraph = false;           // record the inference once and replay it
    LogFunction log = nullptr;        // gets warnings of TensorRT; from any thread, while a call of Engine runs
    void* logUser = nullptr;
};

// An engine on a GPU, with memory for its inputs and outputs there. Movable; one thread at a time. TensorRT has one log
// for a process: what it says of engines that run at the same time in several threads may stand in each other's errors.
class Engine {
public:
    // Checks record, plan, TensorRT, GPU and plugins, in this order, and only then hands the plan to TensorRT.
    static Result<Engine> load(std::string const& plan, Options const& options) noexcept;

    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;
    ~Engine();

    Record const& record() const noexcept;
    std::vector<TensorInfo> const& inputs() const noexcept { return record().inputs; }
    std::vector<TensorInfo> const& outputs() const noexcept { return record().outputs; }
    // "TensorRT 10.3.0.30 on Orin (SM87)"
    std::string const& description() const noexcept;

    // All in one: exactly the engine's inputs, by name and in any order, in; its outputs out.
    Result<std::vector<Tensor>> infer(std::vector<Tensor> const& inputs) noexcept;

    // The same in steps, for a product that keeps its tensors on the GPU or overlaps work.
    Status setInput(std::string const& name, void const* data, size_t bytes) noexcept; // copies to the GPU
    Status enqueue() noexcept;                                                         // on `stream()`; returns at once
    Status synchronize() noexcept;
    Status getOutput(std::string const& name, void* data, size_t bytes) noexcept; // waits, copies from the GPU
    // Where a tensor lies on the GPU (a CUdeviceptr), or null for a name that the engine has not. An input whose
    // address was asked for counts as given.
    void* deviceAddress(std::string const& name) noexcept;
    // The CUstream / cudaStream_t of this engine.
    void* stream() const noexcept;
    // Enqueues once, waits, and returns the time on the GPU in microseconds, copies not counted.
    Result<double> time() noexcept;

private:
    struct Impl;
    explicit Engine(std::unique_ptr<Impl> impl) noexcept;
    std::unique_ptr<Impl> mImpl;
};

// Text that may go to a terminal: cut, and control characters and what is no UTF-8 written as \xHH.
std::string printable(std::string const& text, size_t longest = 120);

} // namespace edgecomp

#endif // EDGECOMP_RUNTIME_H
