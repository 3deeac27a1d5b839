// edgecomp-run: an engine, a safetensors file in, a safetensors file out. A product can start from this file.
//
// Data goes to stdout, talk to stderr. Exit codes: 0 it ran, 2 it did not, for a reason that the one line on stderr
// names; 1 is left to programs that compare.
#include "edgecomp_runtime.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

constexpr int kBAD = 2;
constexpr int32_t kMOST_RUNS = 1000000;
constexpr int32_t kWARMUP = 10;

constexpr char const* kUSAGE =
    "usage: edgecomp-run PLAN --inputs IN.safetensors --outputs OUT.safetensors [options]\n"
    "       edgecomp-run PLAN --check\n"
    "\n"
    "  PLAN              an engine that `edgecomp build` made; its record (.json) lies beside it\n"
    "  --inputs FILE     tensors with the names, types and shapes of the engine's inputs\n"
    "  --prefix TEXT     take the tensors whose names begin with TEXT, without it, and no other; for the golden file\n"
    "                    of a bundle: --prefix input.photo.\n"
    "  --outputs FILE    written whole or not at all\n"
    "  --plugin FILE     a plugin library that the engine needs; once for each. None is loaded unnamed\n"
    "  --tensorrt FILE   TensorRT's library, where it is not found by its usual name\n"
    "  --device N        number of the GPU; 0\n"
    "  --cuda-graph      record the inference once and replay it\n"
    "  --runs N          after that, run N times and print the time on the GPU\n"
    "  --check           compare record and plan, print what the engine takes and gives; needs no GPU\n";

struct Words {
    std::string plan, inputs, prefix, outputs;
    edgecomp::Options options;
    int32_t runs = 0;
    bool isCheck = false;
    bool isHelp = false;
};

int refuse(std::string const& text) {
    std::fprintf(stderr, "error: %s\n", text.c_str());
    return kBAD;
}

int refuse(edgecomp::Error const& error) { return refuse(error.text()); }

// Reads a number from 0 to `most`.
bool readNumber(char const* text, int32_t most, int32_t& number) {
    int64_t value = 0;
    size_t const length = std::strlen(text);
    if (length == 0 || length > 9) return false;
    for (size_t i = 0; i < length; ++i) {
        if (text[i] < '0' || text[i] > '9') return false;
        value = value * 10 + (text[i] - '0');
    }
    number = static_cast<int32_t>(value);
    return value <= most;
}

// Returns "" or what is wrong with the words.
std::string readWords(int count, char** given, Words& words) {
    for (int i = 1; i < count; ++i) {
        std::string const word = given[i];
        if (word == "--help" || word == "-h") return words.isHelp = true, "";
        if (word == "--check") {
            words.isCheck = true;
            continue;
        }
        if (word == "--cuda-graph") {
            words.options.cudaGraph = true;
            continue;
        }
        if (word.empty() || word[0] != '-') {
            if (!words.plan.empty()) return "a second plan: '" + edgecomp::printable(word) + "'; one is run at a time";
            words.plan = word;
            continue;
        }
        bool const isNumber = word == "--device" || word == "--runs";
        std::string* const text = word == "--inputs"     ? &words.inputs
                                  : word == "--prefix"   ? &words.prefix
                                  : word == "--outputs"  ? &words.outputs
                                  : word == "--tensorrt" ? &words.options.tensorrt
                                                         : nullptr;
        if (text == nullptr && !isNumber && word != "--plugin") {
            return "unknown option '" + edgecomp::printable(word) + "'; --help lists them";
        }
        if (++i == count) return word + " needs a value; see --help";
        if (isNumber) {
            bool const isRuns = word == "--runs";
            if (!readNumber(given[i], isRuns ? kMOST_RUNS : 1024, isRuns ? words.runs : words.options.device)) {
                return word + " '" + edgecomp::printable(given[i]) + "' is no number from 0 to " +
                       std::to_string(isRuns ? kMOST_RUNS : 1024);
            }
        } else if (text != nullptr) {
            *text = given[i];
        } else {
            words.options.plugins.emplace_back(given[i]);
        }
    }
    if (words.plan.empty()) return "no plan is named; see --help";
    if (!words.isCheck && words.inputs.empty()) return "--inputs FILE is missing; see --help";
    if (!words.isCheck && words.outputs.empty()) return "--outputs FILE is missing; see --help";
    return "";
}

bool isSameFile(std::string const& one, std::string const& other) {
    struct stat first {}, second {};
    return ::stat(one.c_str(), &first) == 0 && ::stat(other.c_str(), &second) == 0 &&
           first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

void print(char const* kind, std::vector<edgecomp::TensorInfo> const& infos) {
    for (edgecomp::TensorInfo const& info : infos) {
        std::printf("%-7s %s  %s\n", kind, edgecomp::printable(info.name).c_str(), info.text().c_str());
    }
}

int check(std::string const& plan) {
    edgecomp::Result<edgecomp::Record> record = edgecomp::checkPlan(plan);
    if (!record) return refuse(record.error());
    std::printf("plan    %s  %lld bytes, sha256 %s: as its record says\n", edgecomp::printable(record->model).c_str(),
                static_cast<long long>(record->sizeBytes), record->sha256.substr(0, 12).c_str());
    std::string sm;
    for (int64_t const number : record->sm) sm += (sm.empty() ? "SM" : ", SM") + std::to_string(number);
    std::printf("needs   %s %s, %s (%s), precision %s\n", record->runtime == "rtx" ? "TensorRT for RTX" : "TensorRT",
                edgecomp::printable(record->runtimeVersion).c_str(), sm.c_str(),
                edgecomp::printable(record->target).c_str(), edgecomp::printable(record->precision).c_str());
    for (edgecomp::PluginRecord const& plugin : record->plugins) {
        std::printf("plugin  %s for %s  sha256 %s\n", edgecomp::printable(plugin.library).c_str(),
                    edgecomp::printable(plugin.op).c_str(), plugin.sha256.substr(0, 12).c_str());
    }
    print("input", record->inputs);
    print("output", record->outputs);
    return 0;
}

void printWarning(char const* text, void*) { std::fprintf(stderr, "TensorRT: %s\n", text); }

int run(Words& words) {
    if (isSameFile(words.inputs, words.outputs)) return refuse("--outputs names the file of --inputs; name another");
    edgecomp::Result<std::vector<edgecomp::Tensor>> inputs = edgecomp::readSafetensors(words.inputs);
    if (!inputs) return refuse(inputs.error());
    if (!words.prefix.empty()) {
        std::vector<edgecomp::Tensor> kept;
        for (edgecomp::Tensor& tensor : *inputs) {
            if (tensor.info.name.compare(0, words.prefix.size(), words.prefix) != 0) continue;
            tensor.info.name.erase(0, words.prefix.size());
            kept.push_back(std::move(tensor));
        }
        if (kept.empty()) {
            return refuse(edgecomp::printable(words.inputs) + ": no tensor's name begins with '" +
                          edgecomp::printable(words.prefix) + "'");
        }
        *inputs = std::move(kept);
    }
    words.options.log = printWarning;
    edgecomp::Result<edgecomp::Engine> engine = edgecomp::Engine::load(words.plan, words.options);
    if (!engine) return refuse(engine.error());
    std::fprintf(stderr, "%s\n", engine->description().c_str());

    edgecomp::Result<std::vector<edgecomp::Tensor>> outputs = engine->infer(*inputs);
    if (!outputs) return refuse(outputs.error());
    if (edgecomp::Status done = edgecomp::writeSafetensors(words.outputs, *outputs); !done) return refuse(done.error());
    print("output", engine->outputs());

    std::vector<double> samples;
    for (int32_t i = 0; words.runs > 0 && i < words.runs + kWARMUP; ++i) {
        edgecomp::Result<double> time = engine->time();
        if (!time) return refuse(time.error());
        if (i >= kWARMUP) samples.push_back(*time);
    }
    if (!samples.empty()) {
        std::sort(samples.begin(), samples.end());
        auto const at = [&](size_t percent) { return samples[(samples.size() - 1) * percent / 100]; };
        std::printf("time    p50 %.1f us, p90 %.1f us, p99 %.1f us  %zu runs after %d of warm-up%s\n", at(50), at(90),
                    at(99), samples.size(), kWARMUP, words.options.cudaGraph ? ", replayed from a CUDA graph" : "");
    }
    return 0;
}

} // namespace

int main(int count, char** given) {
    Words words;
    std::string const wrong = readWords(count, given, words);
    if (!wrong.empty()) return refuse(wrong);
    int const code = words.isHelp ? (std::fputs(kUSAGE, stdout), 0) : words.isCheck ? check(words.plan) : run(words);
    if (std::fflush(stdout) != 0) return refuse(std::string("stdout cannot be written: ") + std::strerror(errno));
    return code;
}
