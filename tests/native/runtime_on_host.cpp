// engines/runtime in one program, for the sanitizers: `--files FILE...` reads each as a safetensors file and as a
// record, `--sha256 FILE` hashes its first 0, 1, 2, ... bytes, `--copy IN OUT` reads and writes one,
// `--steps PLAN` uses an engine step by step, and other words are those of edgecomp-run.
#define main edgecomp_run_main
#include "edgecomp_run.cpp"
#undef main
#pragma GCC diagnostic ignored "-Wsubobject-linkage"  // it is no main file here
#include "edgecomp_runtime.cpp"

// Prints how each step of an engine with inputs x (float32 [2, 3]) and m, and the output y (float32 [2, 2]), ends.
int steps(std::string const& plan) {
    edgecomp::Result<edgecomp::Engine> loaded = edgecomp::Engine::load(plan, {});
    if (!loaded) return refuse(loaded.error());
    edgecomp::Engine engine = std::move(*loaded);
    auto const say = [](char const* what, edgecomp::Status const& status) {
        std::printf("%s: %s\n", what, status ? "ok" : status.error().text().c_str());
    };
    std::array<float, 6> x{0, 1, 2, 3, 4, 5};
    std::array<float, 4> y{};
    say("early", engine.enqueue());
    say("short", engine.setInput("x", x.data(), 20));
    say("unknown", engine.setInput("y", x.data(), 24));
    say("x", engine.setInput("x", x.data(), 24));
    say("no m", engine.enqueue());
    std::printf("addresses: %d %d\n", engine.deviceAddress("z") != nullptr, engine.deviceAddress("m") != nullptr);
    for (int round = 0; round < 2; ++round) {
        say("x", engine.setInput("x", x.data(), 24));
        say("run", engine.enqueue());
        say("wait", engine.synchronize());
        say("y", engine.getOutput("y", y.data(), 16));
        std::printf("%g %g %g %g\n", y[0], y[1], y[2], y[3]);
        x = {9, 8, 7, 6, 5, 4};
    }
    say("x is no output", engine.getOutput("x", y.data(), 16));
    say("small", engine.getOutput("y", y.data(), 12));
    return engine.stream() != nullptr ? 0 : 3;
}

int main(int count, char** given) {
    std::string const word = count > 1 ? given[1] : "";
    if (word == "--sha256") {
        edgecomp::Result<edgecomp::File> file = edgecomp::File::open(given[2], 4096, "");
        std::vector<uint8_t> content(static_cast<size_t>(file->size()));
        if (!file->read(content.data(), content.size())) return 3;
        for (size_t size = 0; size <= content.size(); ++size) {
            edgecomp::Sha256 sha;
            sha.add(content.data(), size / 3);  // in two parts
            sha.add(content.data() + size / 3, size - size / 3);
            std::printf("%s\n", sha.hex().c_str());
        }
        return 0;
    }
    if (word == "--copy") {
        edgecomp::Result<std::vector<edgecomp::Tensor>> tensors = edgecomp::readSafetensors(given[2]);
        if (!tensors) return refuse(tensors.error());
        std::reverse(tensors->begin(), tensors->end());
        edgecomp::Status const done = edgecomp::writeSafetensors(given[3], *tensors);
        return done ? 0 : refuse(done.error());
    }
    if (word == "--steps") return steps(given[2]);
    if (word != "--files") return edgecomp_run_main(count, given);
    for (int i = 2; i < count; ++i) {
        std::printf("%s\n", given[i]);
        std::fflush(stdout);
        edgecomp::Result<std::vector<edgecomp::Tensor>> tensors = edgecomp::readSafetensors(given[i]);
        if (!tensors) std::printf("tensors: %s\n", tensors.error().text().c_str());
        if (tensors) {
            std::printf("tensors ok\n");
            for (edgecomp::Tensor const& tensor : *tensors) {
                edgecomp::Sha256 sha;
                sha.add(tensor.data.data(), tensor.data.size());
                std::printf("%s %s %s\n", edgecomp::jsonText(tensor.info.name).c_str(), tensor.info.text().c_str(),
                            sha.hex().c_str());
            }
        }
        std::string const path = given[i];
        edgecomp::Result<edgecomp::Record> record = edgecomp::readRecord(path.substr(0, path.rfind('.')) + ".engine");
        std::printf("record%s\n", record ? " ok" : (": " + record.error().text()).c_str());
    }
    return 0;
}
