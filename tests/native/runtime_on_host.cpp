// engines/runtime in one program, for the sanitizers: `--files FILE...` reads each as a safetensors file and as a
// record, `--sha256 FILE` hashes its first 0, 1, 2, ... bytes, and other words are those of edgecomp-run.
#define main edgecomp_run_main
#include "edgecomp_run.cpp"
#undef main
#pragma GCC diagnostic ignored "-Wsubobject-linkage"  // it is no main file here
#include "edgecomp_runtime.cpp"

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
