#include "plugin.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>

using namespace nvinfer1;

namespace edgecomp {
namespace {

constexpr AsciiChar const* kNAME = "TopKMerge";
constexpr AsciiChar const* kVERSION = "1";
constexpr AsciiChar const* kNAMESPACE = "edgecomp";

// Positions of the tensors; `scores` is there only with by_score.
enum : int32_t { kMETRIC, kX, kSIZE, kSCORES };
enum : int32_t { kY, kMERGED_SIZE, kSRC_MAP };

constexpr AsciiChar const* kWITH_MAP = "with_map";  // 1: src_map is an output, 0: it is left out

struct Word {
    AsciiChar const* attribute;
    int32_t edgecomp_topk_merge_params::* member;
    std::array<AsciiChar const*, 5> values;  // in the order of the enumerators of kernel.h; the rest is null
};

constexpr std::array<Word, 3> kWORDS{{
    {"mode", &edgecomp_topk_merge_params::mode, {"wavg", "mean", "sum", "prune", "tofu"}},
    {"partition", &edgecomp_topk_merge_params::partition, {"alternate", "by_score"}},
    {"order", &edgecomp_topk_merge_params::order, {"ascending", "rank"}},
}};

struct Number {
    AsciiChar const* attribute;
    int32_t edgecomp_topk_merge_params::* member;
};

constexpr std::array<Number, 2> kNUMBERS{{
    {"r", &edgecomp_topk_merge_params::r},
    {"num_prefix_tokens", &edgecomp_topk_merge_params::num_prefix_tokens},
}};

std::atomic<ILoggerFinder*> gFinder{nullptr};

// Hands a message to TensorRT's logger, or to stderr where the library was loaded without one.
__attribute__((format(printf, 1, 2))) void logError(char const* format, ...) noexcept {
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    ILoggerFinder* const finder = gFinder.load();
    ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

int32_t dtypeOf(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT:
            return EDGECOMP_FLOAT32;
        case DataType::kHALF:
            return EDGECOMP_FLOAT16;
        case DataType::kBF16:
            return EDGECOMP_BFLOAT16;
        default:
            return -1;
    }
}

std::string describe(Dims const& dims) {
    std::string text = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text += (i ? ", " : "") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

bool hasShape(Dims const& dims, std::initializer_list<int64_t> expected) {
    return dims.nbDims == static_cast<int32_t>(expected.size()) && std::equal(expected.begin(), expected.end(), dims.d);
}

// Fills in the sizes; false, with a message, where the shapes do not fit the op.
bool readShapes(edgecomp_topk_merge_params& p, std::array<Dims, 4> const& dims, DataType type, int32_t nbInputs) {
    Dims const& metric = dims[kMETRIC];
    Dims const& x = dims[kX];
    if (metric.nbDims != 3 || x.nbDims != 3) {
        logError("TopKMerge: metric has the shape %s and x %s; both need three dimensions", describe(metric).c_str(),
                 describe(x).c_str());
        return false;
    }
    p.batch = static_cast<int32_t>(std::min<int64_t>(x.d[0], INT32_MAX));
    p.tokens = static_cast<int32_t>(std::min<int64_t>(x.d[1], INT32_MAX));
    p.metric_width = static_cast<int32_t>(std::min<int64_t>(metric.d[2], INT32_MAX));
    p.width = static_cast<int32_t>(std::min<int64_t>(x.d[2], INT32_MAX));
    p.dtype = dtypeOf(type);
    if (!hasShape(metric, {x.d[0], x.d[1], metric.d[2]}) || !hasShape(dims[kSIZE], {x.d[0], x.d[1], 1}) ||
        (nbInputs > kSCORES && !hasShape(dims[kSCORES], {x.d[0], x.d[1]}))) {
        logError("TopKMerge: x has the shape %s; metric needs [B, N, any] and has %s, size [B, N, 1] and has %s%s%s",
                 describe(x).c_str(), describe(metric).c_str(), describe(dims[kSIZE]).c_str(),
                 nbInputs > kSCORES ? ", scores [B, N] and has " : "",
                 nbInputs > kSCORES ? describe(dims[kSCORES]).c_str() : "");
        return false;
    }
    int32_t const code = edgecomp_topk_merge_check(&p);
    if (code != 0) {
        logError("TopKMerge: %s (x %s, metric %s, r = %d, num_prefix_tokens = %d); build without the plugin",
                 edgecomp_topk_merge_error(code), describe(x).c_str(), describe(metric).c_str(), p.r,
                 p.num_prefix_tokens);
        return false;
    }
    return true;
}

bool isDynamic(Dims const& dims) noexcept {
    return std::any_of(dims.d, dims.d + dims.nbDims, [](int64_t size) { return size < 0; });
}

// The attribute of that name, or null with a message.
PluginField const* findField(PluginFieldCollection const& fields, AsciiChar const* name, PluginFieldType type) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        PluginField const& field = fields.fields[i];
        if (std::strcmp(field.name, name) != 0) continue;
        if (field.type != type || field.data == nullptr || field.length < 1) {
            logError("TopKMerge: attribute '%s' is not %s", name, type == PluginFieldType::kINT32 ? "one int" : "text");
            return nullptr;
        }
        return &field;
    }
    logError("TopKMerge: the node has no attribute '%s'; every attribute has to be written", name);
    return nullptr;
}

bool readWord(PluginFieldCollection const& fields, Word const& word, edgecomp_topk_merge_params& p) {
    PluginField const* const field = findField(fields, word.attribute, PluginFieldType::kCHAR);
    if (field == nullptr) return false;
    auto const* const text = static_cast<char const*>(field->data);
    std::string const value(text, strnlen(text, static_cast<size_t>(field->length)));
    std::string known;
    for (size_t i = 0; i < word.values.size() && word.values[i] != nullptr; ++i) {
        if (value == word.values[i]) {
            p.*word.member = static_cast<int32_t>(i);
            return true;
        }
        known += (i ? ", " : "") + std::string(word.values[i]);
    }
    logError("TopKMerge: %s = '%s' is unknown; known: %s", word.attribute, value.c_str(), known.c_str());
    return false;
}

bool readNumber(PluginFieldCollection const& fields, AsciiChar const* attribute, int32_t& value) {
    PluginField const* const field = findField(fields, attribute, PluginFieldType::kINT32);
    if (field == nullptr) return false;
    value = *static_cast<int32_t const*>(field->data);
    return true;
}

}  // namespace

TopKMergePlugin::TopKMergePlugin(edgecomp_topk_merge_params const& attributes, int32_t withMap)
    : mParams(attributes), mWithMap(withMap) {}

int32_t TopKMergePlugin::expectedInputs() const noexcept {
    return mParams.partition == EDGECOMP_BY_SCORE ? kSCORES + 1 : kSCORES;
}

IPluginCapability* TopKMergePlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* TopKMergePlugin::clone() noexcept { return new (std::nothrow) TopKMergePlugin(mParams, mWithMap); }

AsciiChar const* TopKMergePlugin::getPluginName() const noexcept { return kNAME; }
AsciiChar const* TopKMergePlugin::getPluginVersion() const noexcept { return kVERSION; }
AsciiChar const* TopKMergePlugin::getPluginNamespace() const noexcept { return kNAMESPACE; }
int32_t TopKMergePlugin::getNbOutputs() const noexcept { return mWithMap != 0 ? kSRC_MAP + 1 : kSRC_MAP; }

int32_t TopKMergePlugin::getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
                                            int32_t nbInputs) const noexcept {
    if (nbInputs != expectedInputs() || nbOutputs != getNbOutputs()) {
        logError("TopKMerge: %d inputs and %d outputs; with this partition and with_map it has %d and %d", nbInputs,
                 nbOutputs, expectedInputs(), getNbOutputs());
        return -1;
    }
    outputTypes[kY] = inputTypes[kX];
    outputTypes[kMERGED_SIZE] = DataType::kFLOAT;
    if (mWithMap != 0) outputTypes[kSRC_MAP] = DataType::kINT32;
    return 0;
}

int32_t TopKMergePlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
                                         DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept {
    if (nbInputs != expectedInputs() || nbOutputs != getNbOutputs() || inputs[kX].nbDims != 3) {
        logError("TopKMerge: %d inputs, the second with %d dimensions; it needs %d, and three", nbInputs,
                 nbInputs > kX ? inputs[kX].nbDims : 0, expectedInputs());
        return -1;
    }
    IDimensionExpr const* const batch = inputs[kX].d[0];
    IDimensionExpr const* const tokens = inputs[kX].d[1];
    IDimensionExpr const* const rows =
        exprBuilder.operation(DimensionOperation::kSUB, *tokens, *exprBuilder.constant(mParams.r));
    outputs[kY].nbDims = 3;
    outputs[kY].d[0] = batch;
    outputs[kY].d[1] = rows;
    outputs[kY].d[2] = inputs[kX].d[2];
    outputs[kMERGED_SIZE].nbDims = 3;
    outputs[kMERGED_SIZE].d[0] = batch;
    outputs[kMERGED_SIZE].d[1] = rows;
    outputs[kMERGED_SIZE].d[2] = exprBuilder.constant(1);
    if (mWithMap != 0) {
        outputs[kSRC_MAP].nbDims = 2;
        outputs[kSRC_MAP].d[0] = batch;
        outputs[kSRC_MAP].d[1] = tokens;
    }
    return 0;
}

bool TopKMergePlugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                                int32_t nbOutputs) noexcept {
    if (nbInputs != expectedInputs() || nbOutputs != getNbOutputs()) return false;
    PluginTensorDesc const& desc = inOut[pos].desc;
    if (desc.format != TensorFormat::kLINEAR) return false;
    if (pos == kMETRIC) return dtypeOf(desc.type) >= 0;
    if (pos == kX || pos == nbInputs + kY) return desc.type == inOut[kMETRIC].desc.type;
    return desc.type == (pos == nbInputs + kSRC_MAP ? DataType::kINT32 : DataType::kFLOAT);
}

int32_t TopKMergePlugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                         DynamicPluginTensorDesc const*, int32_t) noexcept {
    std::array<Dims, 4> dims{};
    for (int32_t i = 0; i < nbInputs; ++i) {
        dims[i] = isDynamic(in[i].desc.dims) ? in[i].max : in[i].desc.dims;
    }
    edgecomp_topk_merge_params p = mParams;
    return readShapes(p, dims, in[kMETRIC].desc.type, nbInputs) ? 0 : -1;
}

size_t TopKMergePlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                                         DynamicPluginTensorDesc const*, int32_t) const noexcept {
    std::array<Dims, 4> dims{};
    for (int32_t i = 0; i < nbInputs; ++i) dims[i] = inputs[i].max;
    edgecomp_topk_merge_params p = mParams;
    return readShapes(p, dims, inputs[kMETRIC].desc.type, nbInputs) ? edgecomp_topk_merge_workspace(&p) : 0;
}

int32_t TopKMergePlugin::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                                       int32_t) noexcept {
    std::array<Dims, 4> dims{};
    for (int32_t i = 0; i < nbInputs; ++i) dims[i] = in[i].dims;
    return readShapes(mParams, dims, in[kMETRIC].type, nbInputs) ? 0 : -1;
}

int32_t TopKMergePlugin::enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    auto const* const scores =
        mParams.partition == EDGECOMP_BY_SCORE ? static_cast<float const*>(inputs[kSCORES]) : nullptr;
    void* const srcMap = mWithMap != 0 ? outputs[kSRC_MAP] : nullptr;
    int32_t const code = edgecomp_topk_merge(
        stream, &mParams, inputs[kMETRIC], inputs[kX], static_cast<float const*>(inputs[kSIZE]), scores, outputs[kY],
        static_cast<float*>(outputs[kMERGED_SIZE]), static_cast<int32_t*>(srcMap), workspace,
        edgecomp_topk_merge_workspace(&mParams));
    if (code != 0) logError("TopKMerge: %s", edgecomp_topk_merge_error(code));
    return code;
}

IPluginV3* TopKMergePlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

PluginFieldCollection const* TopKMergePlugin::getFieldsToSerialize() noexcept {
    mFields.clear();
    for (Number const& number : kNUMBERS) {
        mFields.emplace_back(number.attribute, &(mParams.*number.member), PluginFieldType::kINT32, 1);
    }
    mFields.emplace_back(kWITH_MAP, &mWithMap, PluginFieldType::kINT32, 1);
    for (Word const& word : kWORDS) {
        AsciiChar const* const value = word.values[static_cast<size_t>(mParams.*word.member)];
        mFields.emplace_back(word.attribute, value, PluginFieldType::kCHAR, static_cast<int32_t>(strlen(value) + 1));
    }
    mCollection.nbFields = static_cast<int32_t>(mFields.size());
    mCollection.fields = mFields.data();
    return &mCollection;
}

TopKMergeCreator::TopKMergeCreator() {
    for (Number const& number : kNUMBERS) {
        mFields.emplace_back(number.attribute, nullptr, PluginFieldType::kINT32, 1);
    }
    mFields.emplace_back(kWITH_MAP, nullptr, PluginFieldType::kINT32, 1);
    for (Word const& word : kWORDS) mFields.emplace_back(word.attribute, nullptr, PluginFieldType::kCHAR, 1);
    mCollection.nbFields = static_cast<int32_t>(mFields.size());
    mCollection.fields = mFields.data();
}

IPluginV3* TopKMergeCreator::createPlugin(AsciiChar const*, PluginFieldCollection const* fc, TensorRTPhase) noexcept {
    if (fc == nullptr) return nullptr;
    edgecomp_topk_merge_params p{};
    for (Number const& number : kNUMBERS) {
        if (!readNumber(*fc, number.attribute, p.*number.member)) return nullptr;
    }
    int32_t withMap = 0;
    if (!readNumber(*fc, kWITH_MAP, withMap)) return nullptr;
    for (Word const& word : kWORDS) {
        if (!readWord(*fc, word, p)) return nullptr;
    }
    if (p.r < 1 || p.num_prefix_tokens < 0) {
        logError("TopKMerge: r = %d and num_prefix_tokens = %d; at least 1 and 0 are needed", p.r, p.num_prefix_tokens);
        return nullptr;
    }
    return new (std::nothrow) TopKMergePlugin(p, withMap);
}

PluginFieldCollection const* TopKMergeCreator::getFieldNames() noexcept { return &mCollection; }
AsciiChar const* TopKMergeCreator::getPluginName() const noexcept { return kNAME; }
AsciiChar const* TopKMergeCreator::getPluginVersion() const noexcept { return kVERSION; }
AsciiChar const* TopKMergeCreator::getPluginNamespace() const noexcept { return kNAMESPACE; }

}  // namespace edgecomp

IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    static edgecomp::TopKMergeCreator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    nbCreators = 1;
    return creators;
}

void setLoggerFinder(ILoggerFinder* finder) { edgecomp::gFinder.store(finder); }

#if defined(EDGECOMP_PLUGIN_INFO)
// Read from the file by `edgecomp plugin`, which does not have to load the library for it.
extern "C" EDGECOMP_API __attribute__((used)) char const edgecomp_plugin_info[] =
    "edgecomp-plugin-info " EDGECOMP_PLUGIN_INFO;
#endif
