// Files first (text, sha256, JSON, safetensors, records), then CUDA's driver, TensorRT, and the engine.
#include "edgecomp_runtime.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string_view>
#include <type_traits>

#if NV_TENSORRT_MAJOR < 10 && !defined(TRT_MAJOR_RTX)
#error "edgecomp_runtime.cpp needs the headers of TensorRT 10 or newer, or of TensorRT for RTX"
#endif

namespace edgecomp {
namespace {

constexpr int64_t kLARGEST_RECORD = int64_t{1} << 24;   // bytes; edgecomp/engines/record.py has the same
constexpr int64_t kLARGEST_HEADER = int64_t{1} << 24;   // bytes, of a safetensors file
constexpr int64_t kLARGEST_FILE = int64_t{1} << 36;     // bytes, of a plan or a safetensors file
constexpr int64_t kLARGEST_LIBRARY = int64_t{1} << 30;  // bytes; edgecomp/engines/plugins.py has the same
constexpr size_t kMOST_VALUES = size_t{1} << 18;        // in one JSON text
constexpr int32_t kDEEPEST = 32;                        // objects and lists within each other
constexpr size_t kMOST_SIZES = 8;                       // dimensions of a tensor; TensorRT has no more
constexpr size_t kLONGEST_PATH = 1024;                  // bytes of a path in a message; of a name 120
constexpr size_t kCHUNK = size_t{1} << 20;              // bytes read at once

// -- text -----------------------------------------------------------------------------------------------------------

std::string asText(std::string const& value) { return value; }
std::string asText(char const* value) { return value; }
template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
std::string asText(T value) {
    return std::to_string(value);
}

template <class... T>
std::string cat(T const&... parts) {
    std::string text;
    ((text += asText(parts)), ...);
    return text;
}

std::string shownPath(std::string const& path) { return printable(path, kLONGEST_PATH); }

std::string quoted(std::string const& text) { return cat("'", printable(text), "'"); }

template <class List, class Text>
std::string joined(List const& list, Text const& text) {
    constexpr size_t kMOST = 16;
    std::string all;
    size_t count = 0;
    for (auto const& item : list) {
        if (count == kMOST) return cat(all, ", ...");
        all += cat(count++ ? ", " : "", text(item));
    }
    return all;
}

// Returns how many bytes the UTF-8 character at `text` takes, or 0 where there is none.
size_t characterAt(char const* text, char const* end) noexcept {
    auto const first = static_cast<uint8_t>(*text);
    if (first < 0x80) return 1;
    size_t const size = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4 || static_cast<size_t>(end - text) < size) return 0;
    for (size_t i = 1; i < size; ++i) {
        if ((static_cast<uint8_t>(text[i]) & 0xC0) != 0x80) return 0;
    }
    auto const second = static_cast<uint8_t>(text[1]);
    bool const overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
    bool const beyond = (first == 0xED && second > 0x9F) || (first == 0xF4 && second > 0x8F);
    return overlong || beyond ? 0 : size;
}

std::string reason(int32_t error) { return std::strerror(error); }

// -- sha256 (FIPS 180-4) --------------------------------------------------------------------------------------------

class Sha256 {
public:
    void add(uint8_t const* data, size_t size) noexcept {
        mTotal += size;
        while (size > 0) {
            if (mFilled == 0 && size >= mBlock.size()) {
                transform(data);
                data += mBlock.size();
                size -= mBlock.size();
                continue;
            }
            size_t const taken = std::min(size, mBlock.size() - mFilled);
            std::memcpy(mBlock.data() + mFilled, data, taken);
            mFilled += taken;
            data += taken;
            size -= taken;
            if (mFilled == mBlock.size()) {
                transform(mBlock.data());
                mFilled = 0;
            }
        }
    }

    std::string hex() noexcept {
        uint64_t const bits = mTotal * 8;
        uint8_t const one = 0x80, zero = 0;
        add(&one, 1);
        while (mFilled != 56) add(&zero, 1);
        std::array<uint8_t, 8> length{};
        for (size_t i = 0; i < length.size(); ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
        add(length.data(), length.size());
        std::string text;
        for (uint32_t const word : mState) {
            for (int32_t shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15];
        }
        return text;
    }

private:
    static uint32_t turn(uint32_t value, uint32_t by) noexcept { return value >> by | value << (32 - by); }

    void transform(uint8_t const* block) noexcept {
        static constexpr std::array<uint32_t, 64> kROUND{
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
            0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
            0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
            0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
            0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
            0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
            0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        std::array<uint32_t, 64> w{};
        for (size_t i = 0; i < 16; ++i) {
            w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8 |
                   uint32_t{block[4 * i + 3]};
        }
        for (size_t i = 16; i < 64; ++i) {
            uint32_t const low = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
            uint32_t const high = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + low + w[i - 7] + high;
        }
        auto [a, b, c, d, e, f, g, h] = mState;
        for (size_t i = 0; i < 64; ++i) {
            uint32_t const choice = (e & f) ^ (~e & g), majority = (a & b) ^ (a & c) ^ (b & c);
            uint32_t const first = h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + choice + kROUND[i] + w[i];
            uint32_t const second = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + majority;
            h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
        }
        std::array<uint32_t, 8> const added{a, b, c, d, e, f, g, h};
        for (size_t i = 0; i < added.size(); ++i) mState[i] += added[i];
    }

    std::array<uint32_t, 8> mState{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<uint8_t, 64> mBlock{};
    size_t mFilled = 0;
    uint64_t mTotal = 0;
};

// -- files ----------------------------------------------------------------------------------------------------------

// An open file that closes itself.
class File {
public:
    File() = default;
    File(File&& other) noexcept : mHandle(std::exchange(other.mHandle, -1)), mSize(other.mSize) {}
    File& operator=(File&&) = delete;
    ~File() {
        if (mHandle >= 0) ::close(mHandle);
    }

    // Opens a plain file for reading. A pipe is refused and not waited for.
    static Result<File> open(std::string const& path, int64_t largest, char const* remedy) {
        File file;
        file.mHandle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        struct stat found {};
        if (file.mHandle < 0 || ::fstat(file.mHandle, &found) != 0) {
            return Error{Code::kFILE, cat("cannot be read: ", reason(errno)), shownPath(path), remedy};
        }
        if (!S_ISREG(found.st_mode)) return Error{Code::kFILE, "is no plain file", shownPath(path), remedy};
        file.mSize = found.st_size;
        if (file.mSize > largest) {
            return Error{Code::kFORMAT, cat("has ", file.mSize, " bytes; at most ", largest, " are read"),
                         shownPath(path), remedy};
        }
        return file;
    }

    int64_t size() const noexcept { return mSize; }

    // Reads so many bytes from where the last read ended; false: the file is shorter, or errno says why.
    bool read(uint8_t* data, size_t size) noexcept {
        while (size > 0) {
            errno = 0;
            ssize_t const got = ::read(mHandle, data, std::min(size, kCHUNK));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return false;
            data += got;
            size -= static_cast<size_t>(got);
        }
        return true;
    }

private:
    int32_t mHandle = -1;
    int64_t mSize = 0;
};

Error shortRead(std::string const& path) {
    bool const failed = errno != 0;
    return {Code::kFILE, failed ? cat("cannot be read: ", reason(errno)) : "became shorter while it was read",
            shownPath(path), "copy it here again"};
}

// -- JSON (RFC 8259), strict ----------------------------------------------------------------------------------------

struct Json {
    enum class Kind : uint8_t { kNULL, kFALSE, kTRUE, kNUMBER, kTEXT, kLIST, kOBJECT };
    Kind kind = Kind::kNULL;
    std::string text;               // of a text; of a number, as it is written
    std::vector<std::string> keys;  // of an object, in the order of `items`
    std::vector<Json> items;

    Json const* find(std::string_view key) const noexcept {
        for (size_t i = 0; i < keys.size(); ++i) {
            if (keys[i] == key) return &items[i];
        }
        return nullptr;
    }
};

// Reads one JSON text. Duplicate keys, NUL in a text, numbers that end early and words behind the end are errors.
class JsonReader {
public:
    JsonReader(char const* begin, char const* end) noexcept : mBegin(begin), mAt(begin), mEnd(end) {}

    // Returns "", or what is wrong and at which byte.
    std::string read(Json& json) {
        skipSpace();
        bool const whole = value(json, 0);
        if (whole) skipSpace();
        if (whole && mAt != mEnd) fail("something stands behind the end");
        return mError;
    }

private:
    bool fail(char const* what) {
        if (mError.empty()) mError = cat(what, " at byte ", mAt - mBegin);
        return false;
    }

    void skipSpace() noexcept {
        while (mAt != mEnd && (*mAt == ' ' || *mAt == '\t' || *mAt == '\n' || *mAt == '\r')) ++mAt;
    }

    bool take(char wanted) noexcept {
        if (mAt == mEnd || *mAt != wanted) return false;
        ++mAt;
        return true;
    }

    bool takeWord(std::string_view word) noexcept {
        if (std::string_view(mAt, static_cast<size_t>(mEnd - mAt)).substr(0, word.size()) != word) return false;
        mAt += word.size();
        return true;
    }

    bool value(Json& json, int32_t depth) {
        if (++mCount > kMOST_VALUES) return fail("too many values");
        if (depth > kDEEPEST) return fail("nested too deep");
        if (mAt == mEnd) return fail("the text ends");
        if (*mAt == '{') return object(json, depth);
        if (*mAt == '[') return list(json, depth);
        if (*mAt == '"') {
            json.kind = Json::Kind::kTEXT;
            return text(json.text);
        }
        if (takeWord("null")) return true;
        if (takeWord("true")) return json.kind = Json::Kind::kTRUE, true;
        if (takeWord("false")) return json.kind = Json::Kind::kFALSE, true;
        return number(json);
    }

    bool list(Json& json, int32_t depth) {
        json.kind = Json::Kind::kLIST;
        ++mAt;
        skipSpace();
        if (take(']')) return true;
        do {
            skipSpace();
            json.items.emplace_back();
            if (!value(json.items.back(), depth + 1)) return false;
            skipSpace();
        } while (take(','));
        return take(']') || fail("a list is not closed");
    }

    bool object(Json& json, int32_t depth) {
        json.kind = Json::Kind::kOBJECT;
        ++mAt;
        skipSpace();
        if (take('}')) return true;
        do {
            skipSpace();
            json.keys.emplace_back();
            json.items.emplace_back();
            if (mAt == mEnd || *mAt != '"') return fail("a key is no text");
            if (!text(json.keys.back())) return false;
            skipSpace();
            if (!take(':')) return fail("a key has no value");
            skipSpace();
            if (!value(json.items.back(), depth + 1)) return false;
            skipSpace();
        } while (take(','));
        if (!take('}')) return fail("an object is not closed");
        std::vector<std::string_view> sorted(json.keys.begin(), json.keys.end());
        std::sort(sorted.begin(), sorted.end());
        bool const twice = std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
        return !twice || fail("a key stands there twice in the object that ends");
    }

    bool number(Json& json) {
        char const* const start = mAt;
        auto const digits = [this] {
            char const* const first = mAt;
            while (mAt != mEnd && *mAt >= '0' && *mAt <= '9') ++mAt;
            return mAt != first;
        };
        take('-');
        bool const zero = mAt != mEnd && *mAt == '0';
        char const* const whole = mAt;
        if (!digits() || (zero && mAt - whole > 1)) return fail("no JSON value");
        if (take('.') && !digits()) return fail("a number ends early");
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            if (!digits()) return fail("a number ends early");
        }
        json.kind = Json::Kind::kNUMBER;
        json.text.assign(start, mAt);
        return true;
    }

    bool text(std::string& out) {
        ++mAt;
        while (mAt != mEnd && *mAt != '"') {
            if (static_cast<uint8_t>(*mAt) < 0x20) return fail("a control character in a text");
            if (*mAt == '\\') {
                if (!escape(out)) return false;
                continue;
            }
            size_t const size = characterAt(mAt, mEnd);
            if (size == 0) return fail("no UTF-8");
            out.append(mAt, size);
            mAt += size;
        }
        return take('"') || fail("a text is not closed");
    }

    bool escape(std::string& out) {
        static constexpr std::string_view kNAMES = "\"\\/bfnrt", kMEANT = "\"\\/\b\f\n\r\t";
        ++mAt;
        if (mAt == mEnd) return fail("a text is not closed");
        size_t const at = kNAMES.find(*mAt);
        if (at != std::string_view::npos) {
            out += kMEANT[at];
            ++mAt;
            return true;
        }
        uint32_t code = 0, low = 0;
        if (!take('u') || !hex(code)) return fail("an unknown escape");
        if (code >= 0xD800 && code < 0xDC00) {
            if (!takeWord("\\u") || !hex(low) || low < 0xDC00 || low > 0xDFFF) return fail("half a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        } else if (code >= 0xDC00 && code < 0xE000) {
            return fail("half a surrogate pair");
        }
        if (code == 0) return fail("NUL in a text");
        append(out, code);
        return true;
    }

    bool hex(uint32_t& code) noexcept {
        if (mEnd - mAt < 4) return false;
        code = 0;
        for (int32_t i = 0; i < 4; ++i, ++mAt) {
            char const c = *mAt;
            bool const digit = c >= '0' && c <= '9', upper = c >= 'A' && c <= 'F', lower = c >= 'a' && c <= 'f';
            if (!digit && !upper && !lower) return false;
            code = code << 4 | static_cast<uint32_t>(digit ? c - '0' : (c | 0x20) - 'a' + 10);
        }
        return true;
    }

    static void append(std::string& out, uint32_t code) {
        auto const more = [&](uint32_t shift) { out += static_cast<char>(0x80 | (code >> shift & 0x3F)); };
        if (code < 0x80) {
            out += static_cast<char>(code);
        } else if (code < 0x800) {
            out += static_cast<char>(0xC0 | code >> 6), more(0);
        } else if (code < 0x10000) {
            out += static_cast<char>(0xE0 | code >> 12), more(6), more(0);
        } else {
            out += static_cast<char>(0xF0 | code >> 18), more(12), more(6), more(0);
        }
    }

    char const* mBegin;
    char const* mAt;
    char const* mEnd;
    size_t mCount = 0;
    std::string mError;
};

// Reads a whole number of at least 0; false for any other value.
bool wholeNumber(Json const& json, int64_t& value) noexcept {
    if (json.kind != Json::Kind::kNUMBER || json.text.size() > 18) return false;
    value = 0;
    for (char const c : json.text) {
        if (c < '0' || c > '9') return false;
        value = value * 10 + (c - '0');
    }
    return true;
}

bool wholeNumbers(Json const* json, size_t most, std::vector<int64_t>& values) {
    if (json == nullptr || json->kind != Json::Kind::kLIST || json->items.size() > most) return false;
    values.resize(json->items.size());
    for (size_t i = 0; i < values.size(); ++i) {
        if (!wholeNumber(json->items[i], values[i])) return false;
    }
    return true;
}

std::string jsonText(std::string const& text) {
    std::string out = "\"";
    for (char const c : text) {
        auto const byte = static_cast<uint8_t>(c);
        if (byte < 0x20) {
            std::array<char, 8> escaped{};
            std::snprintf(escaped.data(), escaped.size(), "\\u%04x", byte);
            out += escaped.data();
        } else {
            if (c == '"' || c == '\\') out += '\\';
            out += c;
        }
    }
    return out + '"';
}

// -- types ----------------------------------------------------------------------------------------------------------

struct TypeRow {
    Type type;
    char const* name;         // in records, and numpy's
    char const* safetensors;
    size_t size;
};

constexpr std::array<TypeRow, 11> kTYPES{{
    {Type::kFLOAT64, "float64", "F64", 8},
    {Type::kFLOAT32, "float32", "F32", 4},
    {Type::kFLOAT16, "float16", "F16", 2},
    {Type::kBFLOAT16, "bfloat16", "BF16", 2},
    {Type::kFLOAT8_E4M3, "float8_e4m3fn", "F8_E4M3", 1},
    {Type::kINT64, "int64", "I64", 8},
    {Type::kINT32, "int32", "I32", 4},
    {Type::kINT16, "int16", "I16", 2},
    {Type::kINT8, "int8", "I8", 1},
    {Type::kUINT8, "uint8", "U8", 1},
    {Type::kBOOL, "bool", "BOOL", 1},
}};

TypeRow const& rowOf(Type type) noexcept {
    for (TypeRow const& row : kTYPES) {
        if (row.type == type) return row;
    }
    std::abort();
}

TypeRow const* rowNamed(char const* TypeRow::* column, Json const* json) noexcept {
    if (json == nullptr || json->kind != Json::Kind::kTEXT) return nullptr;
    for (TypeRow const& row : kTYPES) {
        if (json->text == row.*column) return &row;
    }
    return nullptr;
}

// Multiplies sizes; false when the tensor would be larger than any file that is read.
bool countBytes(std::vector<int64_t> const& shape, size_t itemSize, int64_t& bytes) noexcept {
    bytes = static_cast<int64_t>(itemSize);
    bool empty = false;
    for (int64_t const size : shape) {
        empty = empty || size == 0;
        if (size > 0 && bytes > kLARGEST_FILE / size) return false;
        if (size > 0) bytes *= size;
    }
    if (empty) bytes = 0;
    return true;
}

// -- safetensors ----------------------------------------------------------------------------------------------------

// Says which picture begins with these 8 bytes, nullptr for none.
char const* pictureKind(uint8_t const* head) {
    struct Row {
        char const* kind;
        char const* begin;
        size_t size;
    };
    constexpr std::array<Row, 4> kPICTURES{{
        {"PNG", "\x89PNG\r\n\x1a\n", 8}, {"JPEG", "\xff\xd8\xff", 3}, {"WebP", "RIFF", 4}, {"BMP", "BM", 2}}};
    for (Row const& row : kPICTURES) {
        if (std::memcmp(head, row.begin, row.size) == 0) return row.kind;
    }
    return nullptr;
}

struct Stored {
    TensorInfo info;
    int64_t begin = 0;
    int64_t end = 0;
};

// Reads what the header says, and checks it against the size of the data; returns "" or what is wrong.
std::string readHeader(char const* text, size_t size, int64_t dataSize, std::vector<Stored>& stored) {
    Json header;
    std::string wrong = JsonReader(text, text + size).read(header);
    if (!wrong.empty()) return cat("its header is no JSON: ", wrong);
    if (header.kind != Json::Kind::kOBJECT) return "its header is no JSON object";
    for (size_t i = 0; i < header.keys.size(); ++i) {
        Json const& entry = header.items[i];
        if (header.keys[i] == "__metadata__") continue;
        std::string const name = quoted(header.keys[i]);
        Stored tensor;
        tensor.info.name = header.keys[i];
        if (entry.kind != Json::Kind::kOBJECT || entry.keys.size() != 3) {
            return cat("tensor ", name, " is not described by dtype, shape and data_offsets");
        }
        TypeRow const* const row = rowNamed(&TypeRow::safetensors, entry.find("dtype"));
        if (row == nullptr) {
            Json const* const found = entry.find("dtype");
            return cat("tensor ", name, " has the dtype ", quoted(found != nullptr ? found->text : ""), "; known: ",
                       joined(kTYPES, [](TypeRow const& known) { return known.safetensors; }));
        }
        tensor.info.type = row->type;
        if (!wholeNumbers(entry.find("shape"), kMOST_SIZES, tensor.info.shape)) {
            return cat("tensor ", name, " has a shape that is no list of at most ", kMOST_SIZES, " sizes");
        }
        std::vector<int64_t> offsets;
        if (!wholeNumbers(entry.find("data_offsets"), 2, offsets) || offsets.size() != 2) {
            return cat("tensor ", name, " has data_offsets that are not two whole numbers");
        }
        tensor.begin = offsets[0];
        tensor.end = offsets[1];
        if (tensor.begin > tensor.end || tensor.end > dataSize) {
            return cat("tensor ", name, " lies at ", tensor.begin, " to ", tensor.end, " of ", dataSize,
                       " bytes of data");
        }
        int64_t bytes = 0;
        if (!countBytes(tensor.info.shape, row->size, bytes) || bytes != tensor.end - tensor.begin) {
            return cat("tensor ", name, " is ", tensor.info.text(), " and has ", tensor.end - tensor.begin, " bytes");
        }
        stored.push_back(std::move(tensor));
    }
    std::sort(stored.begin(), stored.end(), [](Stored const& one, Stored const& other) {
        return std::pair(one.begin, one.end) < std::pair(other.begin, other.end);
    });
    int64_t at = 0;
    for (Stored const& tensor : stored) {
        if (tensor.begin != at) {
            char const* const how = tensor.begin < at ? ", within" : ", with a gap behind";
            return cat("tensor ", quoted(tensor.info.name), " begins at ", tensor.begin, how,
                       " the data of another that ends at ", at);
        }
        at = tensor.end;
    }
    if (at != dataSize) return cat("its tensors end at ", at, " of ", dataSize, " bytes of data");
    return "";
}

// -- records --------------------------------------------------------------------------------------------------------

constexpr char const* kBUILD_AGAIN = "build the engine again";

std::string recordPath(std::string const& plan) {
    size_t const slash = plan.find_last_of('/');
    size_t const dot = plan.find_last_of('.');
    bool const hasSuffix = dot != std::string::npos && (slash == std::string::npos || dot > slash + 1) && dot > 0;
    return (hasSuffix ? plan.substr(0, dot) : plan) + ".json";
}

// Fills fields from one JSON object, and keeps the first complaint.
class Fields {
public:
    Fields(Json const& json, std::string place) : mJson(json), mPlace(std::move(place)) {
        if (mJson.kind != Json::Kind::kOBJECT) mWrong = cat(mPlace.empty() ? "it" : mPlace, " is no object");
    }

    Json const* item(char const* key) {
        Json const* const found = mWrong.empty() ? mJson.find(key) : nullptr;
        if (found == nullptr && mWrong.empty()) mWrong = cat("it has no ", mPlace, key);
        return found;
    }

    void text(char const* key, std::string& value) {
        Json const* const found = item(key);
        if (found == nullptr) return;
        if (found->kind != Json::Kind::kTEXT) return wrong(key, "no text");
        value = found->text;
    }

    void hash(char const* key, std::string& value) {
        text(key, value);
        bool const isHash = value.size() == 64 && value.find_first_not_of("0123456789abcdef") == std::string::npos;
        if (mWrong.empty() && !isHash) wrong(key, "no sha256");
    }

    void number(char const* key, int64_t& value) {
        Json const* const found = item(key);
        if (found != nullptr && !wholeNumber(*found, value)) wrong(key, "no whole number");
    }

    void numbers(char const* key, size_t most, std::vector<int64_t>& values) {
        Json const* const found = item(key);
        if (found != nullptr && !wholeNumbers(found, most, values)) wrong(key, "no list of whole numbers");
    }

    template <class Item>
    void list(char const* key, size_t most, Item const& each) {
        Json const* const found = item(key);
        if (found == nullptr) return;
        if (found->kind != Json::Kind::kLIST || found->items.size() > most) return wrong(key, "no list, or too long");
        for (size_t i = 0; i < found->items.size() && mWrong.empty(); ++i) {
            Fields fields(found->items[i], cat(mPlace, key, "[", i, "]."));
            each(fields);
            mWrong = fields.mWrong;
        }
    }

    void wrong(char const* key, char const* what) {
        if (mWrong.empty()) mWrong = cat(mPlace, key, " is ", what);
    }

    std::string const& complaint() const noexcept { return mWrong; }

private:
    Json const& mJson;
    std::string mPlace;
    std::string mWrong;
};

std::vector<TensorInfo> readTensors(Fields& record, char const* key) {
    std::vector<TensorInfo> tensors;
    record.list(key, 1024, [&](Fields& fields) {
        TensorInfo tensor;
        fields.text("name", tensor.name);
        fields.numbers("shape", kMOST_SIZES, tensor.shape);
        Json const* const type = fields.item("dtype");
        TypeRow const* const row = rowNamed(&TypeRow::name, type);
        int64_t bytes = 0;
        if (type != nullptr && row == nullptr) fields.wrong("dtype", "a type that this runner does not bind");
        if (row != nullptr) tensor.type = row->type;
        if (row != nullptr && !countBytes(tensor.shape, row->size, bytes)) fields.wrong("shape", "too large");
        for (TensorInfo const& other : tensors) {
            if (other.name == tensor.name) fields.wrong("name", "there twice");
        }
        tensors.push_back(std::move(tensor));
    });
    return tensors;
}

std::string fillRecord(Json const& json, Record& record) {
    Fields fields(json, "");
    int64_t schema = 0;
    fields.number("schema", schema);
    if (fields.complaint().empty() && schema != 1) return cat("it has schema ", schema, ", and this runner reads 1");
    fields.text("model", record.model);
    fields.text("target", record.target);
    fields.text("runtime", record.runtime);
    if (fields.complaint().empty() && record.runtime != "tensorrt" && record.runtime != "rtx") {
        return cat("runtime is ", quoted(record.runtime), "; known: tensorrt, rtx");
    }
    fields.text("runtime_version", record.runtimeVersion);
    fields.numbers("sm", 64, record.sm);
    fields.text("precision", record.precision);
    fields.number("size_bytes", record.sizeBytes);
    fields.hash("sha256", record.sha256);
    record.inputs = readTensors(fields, "inputs");
    record.outputs = readTensors(fields, "outputs");
    for (TensorInfo const& input : record.inputs) {
        for (TensorInfo const& output : record.outputs) {
            if (input.name == output.name) return cat(quoted(input.name), " is an input and an output");
        }
    }
    fields.list("plugins", 64, [&](Fields& plugin) {
        PluginRecord entry;
        plugin.text("name", entry.name);
        plugin.text("op", entry.op);
        plugin.text("version", entry.version);
        plugin.text("library", entry.library);
        plugin.hash("sha256", entry.sha256);
        plugin.numbers("sm", 64, entry.sm);
        plugin.text("tensorrt", entry.tensorrt);
        record.plugins.push_back(std::move(entry));
    });
    return fields.complaint();
}

// Reads a plan into memory and hashes what was read, so that nothing can change between the check and its use.
Result<Bytes> readPlan(std::string const& plan, Record const& record) {
    Result<File> file = File::open(plan, kLARGEST_FILE, kBUILD_AGAIN);
    if (!file) return file.error();
    if (file->size() != record.sizeBytes || file->size() == 0) {
        return Error{Code::kMISMATCH, cat("has ", file->size(), " bytes, and its record says ", record.sizeBytes),
                     shownPath(plan), "it is truncated or another plan: copy both files again, or build again"};
    }
    Result<Bytes> content = Bytes::allocate(static_cast<size_t>(file->size()), "the plan");
    if (!content) return content;
    Sha256 sha;
    for (size_t at = 0; at < content->size(); at += kCHUNK) {
        size_t const size = std::min(kCHUNK, content->size() - at);
        if (!file->read(content->data() + at, size)) return shortRead(plan);
        sha.add(content->data() + at, size);
    }
    std::string const found = sha.hex();
    if (found != record.sha256) {
        return Error{Code::kMISMATCH,
                     cat("has the sha256 ", found.substr(0, 12), ", and its record says ", record.sha256.substr(0, 12)),
                     shownPath(plan), "it was altered or is another plan: copy both files again, or build again"};
    }
    return content;
}

// Finds for each plugin of the record the library that the caller named, by its sha256.
Result<std::vector<std::string>> matchPlugins(Record const& record, std::vector<std::string> const& named) {
    std::vector<std::string> matched(record.plugins.size());
    for (std::string const& path : named) {
        Result<File> file = File::open(path, kLARGEST_LIBRARY, "name the library beside the plan");
        if (!file) return file.error();
        Result<Bytes> block = Bytes::allocate(kCHUNK, "reading a library");
        if (!block) return block.error();
        Sha256 sha;
        for (int64_t left = file->size(); left > 0;) {
            auto const size = static_cast<size_t>(std::min(left, static_cast<int64_t>(kCHUNK)));
            if (!file->read(block->data(), size)) return shortRead(path);
            sha.add(block->data(), size);
            left -= static_cast<int64_t>(size);
        }
        std::string const found = sha.hex();
        bool known = false;
        for (size_t i = 0; i < matched.size(); ++i) {
            if (record.plugins[i].sha256 != found) continue;
            char resolved[PATH_MAX];
            known = ::realpath(path.c_str(), resolved) != nullptr;  // with a slash, so that no search path is used
            if (known) matched[i] = resolved;
        }
        if (!known) {
            std::string const needs = joined(record.plugins, [](PluginRecord const& plugin) {
                return cat(printable(plugin.name), " with ", plugin.sha256.substr(0, 12));
            });
            return Error{Code::kMISMATCH,
                         cat("has the sha256 ", found.substr(0, 12), ", and the engine needs ",
                             needs.empty() ? "no plugin" : needs),
                         shownPath(path), "name the libraries that lie beside the plan, and no other"};
        }
    }
    for (size_t i = 0; i < matched.size(); ++i) {
        if (!matched[i].empty()) continue;
        PluginRecord const& plugin = record.plugins[i];
        return Error{Code::kMISMATCH,
                     cat("the engine needs the plugin ", quoted(plugin.name), " for ", printable(plugin.op)),
                     shownPath(record.path),
                     cat("name its library ", quoted(plugin.library), ", which lies beside the plan (--plugin FILE)")};
    }
    return matched;
}

// -- CUDA's driver, opened at run time ------------------------------------------------------------------------------

using CuHandle = void*;
using CuPointer = unsigned long long;
constexpr int32_t kCOMPUTE_MAJOR = 75, kCOMPUTE_MINOR = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* of cuda.h
constexpr int32_t kNON_BLOCKING = 1;                         // CU_STREAM_NON_BLOCKING
constexpr int32_t kTHREAD_LOCAL = 1;                         // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL

// Name in the library, and type; the names with _v2 are those that cuda.h maps the plain ones to.
#define EDGECOMP_CUDA(X)                                                          \
    X(cuInit, int32_t (*)(uint32_t))                                              \
    X(cuGetErrorName, int32_t (*)(int32_t, char const**))                         \
    X(cuDeviceGetCount, int32_t (*)(int32_t*))                                    \
    X(cuDeviceGet, int32_t (*)(int32_t*, int32_t))                                \
    X(cuDeviceGetName, int32_t (*)(char*, int32_t, int32_t))                      \
    X(cuDeviceGetAttribute, int32_t (*)(int32_t*, int32_t, int32_t))              \
    X(cuDevicePrimaryCtxRetain, int32_t (*)(CuHandle*, int32_t))                  \
    X(cuDevicePrimaryCtxRelease_v2, int32_t (*)(int32_t))                         \
    X(cuCtxPushCurrent_v2, int32_t (*)(CuHandle))                                 \
    X(cuCtxPopCurrent_v2, int32_t (*)(CuHandle*))                                 \
    X(cuMemAlloc_v2, int32_t (*)(CuPointer*, size_t))                             \
    X(cuMemFree_v2, int32_t (*)(CuPointer))                                       \
    X(cuMemsetD8Async, int32_t (*)(CuPointer, unsigned char, size_t, CuHandle))   \
    X(cuMemcpyHtoDAsync_v2, int32_t (*)(CuPointer, void const*, size_t, CuHandle)) \
    X(cuMemcpyDtoHAsync_v2, int32_t (*)(void*, CuPointer, size_t, CuHandle))      \
    X(cuStreamCreate, int32_t (*)(CuHandle*, uint32_t))                           \
    X(cuStreamDestroy_v2, int32_t (*)(CuHandle))                                  \
    X(cuStreamSynchronize, int32_t (*)(CuHandle))                                 \
    X(cuEventCreate, int32_t (*)(CuHandle*, uint32_t))                            \
    X(cuEventDestroy_v2, int32_t (*)(CuHandle))                                   \
    X(cuEventRecord, int32_t (*)(CuHandle, CuHandle))                             \
    X(cuEventElapsedTime, int32_t (*)(float*, CuHandle, CuHandle))                \
    X(cuStreamBeginCapture_v2, int32_t (*)(CuHandle, int32_t))                    \
    X(cuStreamEndCapture, int32_t (*)(CuHandle, CuHandle*))                       \
    X(cuGraphInstantiateWithFlags, int32_t (*)(CuHandle*, CuHandle, unsigned long long)) \
    X(cuGraphLaunch, int32_t (*)(CuHandle, CuHandle))                             \
    X(cuGraphExecDestroy, int32_t (*)(CuHandle))                                  \
    X(cuGraphDestroy, int32_t (*)(CuHandle))

struct Cuda {
#define EDGECOMP_MEMBER(name, ...) std::add_pointer_t<std::remove_pointer_t<__VA_ARGS__>> name = nullptr;
    EDGECOMP_CUDA(EDGECOMP_MEMBER)
#undef EDGECOMP_MEMBER

    // Status of a call; `what` says what was tried.
    Status check(int32_t code, char const* what, char const* remedy = "look at the log of the driver (dmesg)") const {
        if (code == 0) return {};
        char const* name = nullptr;
        if (cuGetErrorName == nullptr || cuGetErrorName(code, &name) != 0 || name == nullptr) name = "an unknown error";
        return Error{code == 2 ? Code::kMEMORY : Code::kDEVICE, cat(what, " failed with ", name, " (", code, ")"),
                     "CUDA", code == 2 ? "free memory of the GPU, or take a smaller engine" : remedy};
    }
};

struct Device {
    int32_t handle = 0;
    int32_t sm = 0;
    std::string name;
};

Status loadCuda(Cuda& cuda) {
    void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        return Error{Code::kDEVICE, cat("there is no NVIDIA driver on this machine (", ::dlerror(), ")"), "",
                     "run it where the GPU is; in a container, start that with the NVIDIA runtime"};
    }
    char const* missing = nullptr;
#define EDGECOMP_FIND(name, ...)                                                     \
    if (void* const found = ::dlsym(library, #name)) {                               \
        cuda.name = reinterpret_cast<decltype(cuda.name)>(found);                    \
    } else if (missing == nullptr) {                                                 \
        missing = #name;                                                             \
    }
    EDGECOMP_CUDA(EDGECOMP_FIND)
#undef EDGECOMP_FIND
    if (missing != nullptr) {
        return Error{Code::kDEVICE, cat("the NVIDIA driver has no ", missing), "libcuda.so.1",
                     "install a driver for CUDA 11.4 or newer"};
    }
    return {};
}

Result<Device> openDevice(Cuda const& cuda, int32_t number) {
    char const* const advice = "run it where a GPU is, and look at CUDA_VISIBLE_DEVICES and nvidia-smi";
    int32_t const code = cuda.cuInit(0);
    int32_t count = 0;
    constexpr int32_t kNO_DEVICE = 100;
    if (code != 0 && code != kNO_DEVICE) return cuda.check(code, "starting CUDA (cuInit)", advice).error();
    if (code == 0) {
        Status const done = cuda.check(cuda.cuDeviceGetCount(&count), "counting GPUs", advice);
        if (!done) return done.error();
    }
    if (count == 0) {
        return Error{Code::kDEVICE, "the NVIDIA driver is there, and no GPU that this process may use", "", advice};
    }
    if (number < 0 || number >= count) {
        return Error{Code::kDEVICE, cat("there is no GPU number ", number, "; there are ", count, ", from 0"), "",
                     "name one that is there"};
    }
    Device device;
    std::array<char, 128> name{};
    int32_t major = 0, minor = 0;
    int32_t failed = cuda.cuDeviceGet(&device.handle, number);
    if (failed == 0) failed = cuda.cuDeviceGetName(name.data(), static_cast<int32_t>(name.size()) - 1, device.handle);
    if (failed == 0) failed = cuda.cuDeviceGetAttribute(&major, kCOMPUTE_MAJOR, device.handle);
    if (failed == 0) failed = cuda.cuDeviceGetAttribute(&minor, kCOMPUTE_MINOR, device.handle);
    if (Status done = cuda.check(failed, "asking for the GPU's name", advice); !done) return done.error();
    device.sm = major * 10 + minor;
    device.name = printable(name.data());
    return device;
}

std::string smText(std::vector<int64_t> const& sm) {
    return joined(sm, [](int64_t number) { return cat("SM", number); });
}

Status requireSm(Record const& record, Device const& device) {
    auto const has = [&](std::vector<int64_t> const& sm) {
        return std::find(sm.begin(), sm.end(), device.sm) != sm.end();
    };
    if (!has(record.sm)) {
        return Error{Code::kMISMATCH,
                     cat("the plan was built for ", smText(record.sm), " (", printable(record.target), "), and ",
                         device.name, " has SM", device.sm),
                     shownPath(record.path), "build the engine for this GPU: edgecomp build BUNDLE --target NAME"};
    }
    for (PluginRecord const& plugin : record.plugins) {
        if (has(plugin.sm)) continue;
        return Error{Code::kMISMATCH,
                     cat("the plugin ", quoted(plugin.name), " was compiled for ", smText(plugin.sm), ", and ",
                         device.name, " has SM", device.sm),
                     shownPath(record.path), cat("compile it again: edgecomp plugin build NAME --sm ", device.sm)};
    }
    return {};
}

// -- TensorRT, opened at run time -----------------------------------------------------------------------------------

// Major, minor, patch and build; -1 where it is not known.
using Version = std::array<int64_t, 4>;

#if defined(TRT_MAJOR_RTX)
constexpr bool kHEADER_IS_RTX = true;
#else
constexpr bool kHEADER_IS_RTX = false;
#endif
constexpr Version kHEADER{NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, -1};
constexpr int64_t kOLDEST_FULL = 7;  // TensorRT for RTX counts from 1, and full TensorRT stands at 10 and 11

char const* title(bool isRtx) noexcept { return isRtx ? "TensorRT for RTX" : "TensorRT"; }

std::string versionText(Version const& version) {
    std::string text;
    for (int64_t const part : version) {
        if (part >= 0) text += cat(text.empty() ? "" : ".", part);
    }
    return text;
}

// Reads "1.7.1.116" or "10.3.0"; what is no number ends it. False: fewer than three numbers.
bool readVersion(std::string const& text, Version& version) noexcept {
    version.fill(-1);
    size_t at = 0;
    for (int64_t& part : version) {
        size_t const first = at;
        for (; at < text.size() && at < first + 9 && text[at] >= '0' && text[at] <= '9'; ++at) {
            part = std::max<int64_t>(part, 0) * 10 + (text[at] - '0');
        }
        if (at == first || at == text.size() || text[at] != '.') break;
        ++at;
    }
    return version[2] >= 0;
}

struct TensorRt {
    using Create = void* (*)(void*, int32_t);
    std::string path;
    Version version{};
    bool isRtx = false;
    Create create = nullptr;

    std::string text() const { return cat(title(isRtx), " ", versionText(version)); }
};

// Opens the library and asks it for its version; calls nothing whose layout depends on the version.
Result<TensorRt> loadTensorRt(std::string const& named, bool isRtx, Version const& wanted) {
    std::string const stem = isRtx ? "libtensorrt_rtx.so" : "libnvinfer.so";
    std::vector<std::string> names{cat(stem, ".", wanted[0]), stem};
    if (!named.empty()) names = {named};
    void* library = nullptr;
    std::string reasons;
    for (std::string const& name : names) {
        library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: TensorRT keeps threads and statics
        if (library != nullptr) break;
        reasons += cat(reasons.empty() ? "" : "; ", ::dlerror());
    }
    if (library == nullptr) {
        return Error{Code::kLIBRARY, cat(title(isRtx), " cannot be loaded: ", reasons), "",
                     "install it, add its folder to LD_LIBRARY_PATH, or name the file (--tensorrt FILE)"};
    }
    auto const number = [&](char const* name) -> int64_t {
        auto const ask = reinterpret_cast<int32_t (*)()>(::dlsym(library, name));
        return ask != nullptr ? ask() : -1;
    };
    TensorRt found;
    found.create = reinterpret_cast<TensorRt::Create>(::dlsym(library, "createInferRuntime_INTERNAL"));
    int64_t const packed = number("getInferLibVersion");
    Dl_info info{};
    bool const known = found.create != nullptr && ::dladdr(reinterpret_cast<void*>(found.create), &info) != 0;
    found.path = shownPath(known && info.dli_fname != nullptr ? info.dli_fname : named);
    if (found.create == nullptr || packed <= 0) {
        return Error{Code::kLIBRARY, "is no TensorRT: it has no createInferRuntime_INTERNAL or no getInferLibVersion",
                     found.path, "name libnvinfer.so or libtensorrt_rtx.so"};
    }
    found.version = {number("getInferLibMajorVersion"), number("getInferLibMinorVersion"),
                     number("getInferLibPatchVersion"), number("getInferLibBuildVersion")};
    if (found.version[0] < 0 || found.version[1] < 0 || found.version[2] < 0) {
        int64_t const scale = packed < 10000 ? 1000 : 10000;  // before TensorRT 10 the major counted thousands
        found.version = {packed / scale, packed % scale / 100, packed % 100, -1};
    }
    found.isRtx = found.version[0] < kOLDEST_FULL;
    return found;
}

// A plan runs in the version that built it; nothing is loaded on the chance that it might fit.
Status requireVersion(Record const& record, bool isRtx, Version const& wanted, TensorRt const& found) {
    bool same = isRtx == found.isRtx;
    for (size_t i = 0; i < wanted.size(); ++i) {
        same = same && (wanted[i] == found.version[i] || (i == 3 && (wanted[i] < 0 || found.version[i] < 0)));
    }
    if (!same) {
        return Error{Code::kMISMATCH,
                     cat("the plan was built by ", title(isRtx), " ", printable(record.runtimeVersion), ", and ",
                         found.path, " is ", found.text()),
                     shownPath(record.path),
                     "build the engine with the TensorRT that runs it (edgecomp build), or name its library"};
    }
    for (PluginRecord const& plugin : record.plugins) {
        Version headers{};
        bool const fits = readVersion(plugin.tensorrt, headers) &&
                          (isRtx ? headers[0] >= 10 : headers[0] == found.version[0]);
        if (fits) continue;
        return Error{Code::kMISMATCH,
                     cat("the plugin ", quoted(plugin.name), " was compiled with the headers of TensorRT ",
                         printable(plugin.tensorrt), ", and ", found.path, " is ", found.text()),
                     shownPath(record.path), "compile it again with fitting headers: edgecomp plugin build"};
    }
    return {};
}

// The layout of TensorRT's interfaces is fixed by the headers of this file. What is called here stands in the same
// place from 10.0 to 10.16, in another from 11.0 on (compared in NVIDIA's headers), and RTX has headers of its own.
Status requireHeaders(TensorRt const& found) {
    bool const fits = found.isRtx == kHEADER_IS_RTX && found.version[0] == kHEADER[0] &&
                      (!kHEADER_IS_RTX || found.version[1] == kHEADER[1]);
    if (fits) return {};
    return Error{Code::kMISMATCH,
                 cat("this program was compiled with the headers of ", title(kHEADER_IS_RTX), " ", versionText(kHEADER),
                     ", and the library is ", found.text(), ": its interfaces may be laid out in another way"),
                 found.path,
                 cat("compile edgecomp_runtime.cpp with the headers of ", title(found.isRtx), " ", found.version[0],
                     found.isRtx ? cat(".", found.version[1]) : std::string())};
}

// TensorRT keeps the first logger of a process for ever, so there is one, and it is never destroyed.
class Logger : public nvinfer1::ILogger {
public:
    static Logger& instance() {
        static Logger* const logger = new Logger;
        return *logger;
    }

    void log(Severity severity, nvinfer1::AsciiChar const* message) noexcept override {
        if (message == nullptr || severity > Severity::kWARNING) return;
        std::lock_guard<std::mutex> const lock(mMutex);
        if (severity == Severity::kWARNING) {
            if (mFunction != nullptr) mFunction(message, mUser);
        } else if (mErrors.size() < 5) {
            mErrors.push_back(message);
        }
    }

    void begin(LogFunction function, void* user) {
        std::lock_guard<std::mutex> const lock(mMutex);
        mFunction = function;
        mUser = user;
        mErrors.clear();
    }

    // The errors since `begin`, in one line.
    std::string errors() {
        std::lock_guard<std::mutex> const lock(mMutex);
        if (mErrors.empty()) return "it gives no reason";
        return joined(mErrors, [](std::string const& error) {
            std::string line = error;
            std::replace_if(line.begin(), line.end(), [](char c) { return static_cast<uint8_t>(c) < 0x20; }, ' ');
            return line;
        });
    }

private:
    std::mutex mMutex;
    LogFunction mFunction = nullptr;
    void* mUser = nullptr;
    std::vector<std::string> mErrors;
};

bool typeOf(nvinfer1::DataType type, Type& found) noexcept {
    using nvinfer1::DataType;
    switch (type) {
        case DataType::kFLOAT: return found = Type::kFLOAT32, true;
        case DataType::kHALF: return found = Type::kFLOAT16, true;
        case DataType::kBF16: return found = Type::kBFLOAT16, true;
        case DataType::kFP8: return found = Type::kFLOAT8_E4M3, true;
        case DataType::kINT64: return found = Type::kINT64, true;
        case DataType::kINT32: return found = Type::kINT32, true;
        case DataType::kINT8: return found = Type::kINT8, true;
        case DataType::kUINT8: return found = Type::kUINT8, true;
        case DataType::kBOOL: return found = Type::kBOOL, true;
        default: return false;
    }
}

// Compares one tensor of an engine with its record; returns "" or how they differ.
std::string differs(nvinfer1::ICudaEngine const& engine, TensorInfo const& wanted, nvinfer1::TensorIOMode mode) {
    char const* const name = wanted.name.c_str();
    if (engine.getTensorIOMode(name) != mode) {
        return cat("has no ", mode == nvinfer1::TensorIOMode::kINPUT ? "input " : "output ", quoted(wanted.name));
    }
    nvinfer1::Dims const dims = engine.getTensorShape(name);
    TensorInfo found;
    bool const known = typeOf(engine.getTensorDataType(name), found.type);
    for (int32_t i = 0; i < dims.nbDims && i < nvinfer1::Dims::MAX_DIMS; ++i) found.shape.push_back(dims.d[i]);
    if (!known || found.type != wanted.type || found.shape != wanted.shape) {
        return cat("has ", quoted(wanted.name), " as ", known ? found.text() : "a type that this runner does not bind",
                   ", and the record says ", wanted.text());
    }
    bool const plain = engine.getTensorLocation(name) == nvinfer1::TensorLocation::kDEVICE &&
                       engine.getTensorFormat(name) == nvinfer1::TensorFormat::kLINEAR;
    return plain ? "" : cat("wants ", quoted(wanted.name), " on the host or in a layout that is not row by row");
}

} // namespace

// -- public: text and memory ----------------------------------------------------------------------------------------

std::string Error::text() const {
    return cat(where.empty() ? "" : cat(where, ": "), what, remedy.empty() ? "" : cat("; ", remedy));
}

std::string printable(std::string const& text, size_t longest) {
    std::string out;
    char const* const end = text.data() + text.size();
    for (char const* at = text.data(); at < end;) {
        if (out.size() >= longest) return out + "...";
        size_t const size = characterAt(at, end);
        auto const byte = static_cast<uint8_t>(*at);
        bool const c1 = size == 2 && byte == 0xC2 && static_cast<uint8_t>(at[1]) < 0xA0;
        if (size == 0 || byte < 0x20 || byte == 0x7F || c1) {
            std::array<char, 8> escaped{};
            std::snprintf(escaped.data(), escaped.size(), "\\x%02X", byte);
            out += escaped.data();
            ++at;
            continue;
        }
        out.append(at, size);
        at += size;
    }
    return out;
}

char const* nameOf(Type type) noexcept { return rowOf(type).name; }

size_t sizeOf(Type type) noexcept { return rowOf(type).size; }

size_t TensorInfo::bytes() const noexcept {
    int64_t bytes = 0;
    return countBytes(shape, sizeOf(type), bytes) ? static_cast<size_t>(bytes) : SIZE_MAX;
}

std::string TensorInfo::text() const {
    return cat(nameOf(type), " [", joined(shape, [](int64_t size) { return asText(size); }), "]");
}

Result<Bytes> Bytes::allocate(size_t size, std::string const& what) {
    Bytes bytes;
    bytes.mData.reset(static_cast<uint8_t*>(std::malloc(size > 0 ? size : 1)));
    if (bytes.mData == nullptr) {
        return Error{Code::kMEMORY, cat("there are no ", size, " bytes of memory for ", what), "", "free memory"};
    }
    bytes.mSize = size;
    return bytes;
}

// -- public: files --------------------------------------------------------------------------------------------------

Result<std::vector<Tensor>> readSafetensors(std::string const& path) noexcept {
    char const* const remedy = "copy or write the file again";
    Result<File> file = File::open(path, kLARGEST_FILE, "name a safetensors file");
    if (!file) return file.error();
    auto const wrong = [&](std::string const& what) { return Error{Code::kFORMAT, what, shownPath(path), remedy}; };
    std::array<uint8_t, 8> prefix{};
    auto const prefixSize = static_cast<int64_t>(prefix.size());
    if (file->size() < prefixSize) return wrong(cat("has ", file->size(), " bytes, too few for safetensors"));
    if (!file->read(prefix.data(), prefix.size())) return shortRead(path);
    uint64_t headerSize = 0;
    for (size_t i = 0; i < prefix.size(); ++i) headerSize |= uint64_t{prefix[i]} << (8 * i);
    if (headerSize > static_cast<uint64_t>(kLARGEST_HEADER)) {
        if (char const* const kind = pictureKind(prefix.data())) {
            return Error{Code::kFORMAT, cat("is a ", kind, " picture, not safetensors"), shownPath(path),
                         "give tensors by name: pictures are decoded and cut before, as `edgecomp run` does"};
        }
        return wrong(cat("says that its header has ", headerSize, " bytes; at most ", kLARGEST_HEADER, " are read"));
    }
    int64_t const dataSize = file->size() - prefixSize - static_cast<int64_t>(headerSize);
    if (dataSize < 0) {
        return wrong(cat("says that its header has ", headerSize, " bytes, and the file has ", file->size()));
    }
    Result<Bytes> header = Bytes::allocate(static_cast<size_t>(headerSize), "a header");
    if (!header) return header.error();
    if (!file->read(header->data(), header->size())) return shortRead(path);
    std::vector<Stored> stored;
    std::string const complaint =
        readHeader(reinterpret_cast<char const*>(header->data()), header->size(), dataSize, stored);
    if (!complaint.empty()) return wrong(complaint);
    std::vector<Tensor> tensors;
    for (Stored& entry : stored) {
        Result<Bytes> data = Bytes::allocate(static_cast<size_t>(entry.end - entry.begin), "a tensor");
        if (!data) return data.error();
        if (!file->read(data->data(), data->size())) return shortRead(path);
        tensors.push_back({std::move(entry.info), std::move(*data)});
    }
    return tensors;
}

Status writeSafetensors(std::string const& path, std::vector<Tensor> const& tensors) noexcept {
    std::vector<Tensor const*> order;
    for (Tensor const& tensor : tensors) order.push_back(&tensor);
    std::stable_sort(order.begin(), order.end(), [](Tensor const* one, Tensor const* other) {
        return sizeOf(one->info.type) > sizeOf(other->info.type);  // so that each is aligned
    });
    std::string header = "{";
    size_t at = 0;
    for (Tensor const* tensor : order) {
        size_t const end = at + tensor->data.size();
        header += cat(header.size() > 1 ? "," : "", jsonText(tensor->info.name), ":{\"dtype\":\"",
                      rowOf(tensor->info.type).safetensors, "\",\"shape\":[",
                      joined(tensor->info.shape, [](int64_t size) { return asText(size); }), "],\"data_offsets\":[", at,
                      ",", end, "]}");
        at = end;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::array<uint8_t, 8> prefix{};
    for (size_t i = 0; i < prefix.size(); ++i) prefix[i] = static_cast<uint8_t>(header.size() >> (8 * i));

    std::string const fresh = cat(path, ".", static_cast<int64_t>(::getpid()), ".tmp");
    int32_t const handle = ::open(fresh.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    auto const failed = [&] {
        return Error{Code::kFILE, cat("cannot be written: ", reason(errno)), shownPath(path),
                     "free space, or name another file"};
    };
    if (handle < 0) return failed();
    auto const write = [&](void const* data, size_t size) {
        auto const* from = static_cast<uint8_t const*>(data);
        while (size > 0) {
            ssize_t const put = ::write(handle, from, std::min(size, kCHUNK));
            if (put < 0 && errno == EINTR) continue;
            if (put < 0) return false;
            from += put;
            size -= static_cast<size_t>(put);
        }
        return true;
    };
    bool whole = write(prefix.data(), prefix.size()) && write(header.data(), header.size());
    for (Tensor const* tensor : order) whole = whole && write(tensor->data.data(), tensor->data.size());
    whole = whole && ::fsync(handle) == 0;
    Status status;
    if (!whole) status = failed();
    ::close(handle);
    if (whole && ::rename(fresh.c_str(), path.c_str()) != 0) status = failed();
    if (!status) ::unlink(fresh.c_str());
    return status;
}

Result<Record> readRecord(std::string const& plan) noexcept {
    std::string const path = recordPath(plan);
    char const* const remedy = "copy the JSON file that lies beside the engine, or build again";
    Result<File> file = File::open(path, kLARGEST_RECORD, remedy);
    if (!file) return file.error();
    Result<Bytes> content = Bytes::allocate(static_cast<size_t>(file->size()), "a record");
    if (!content) return content.error();
    if (!file->read(content->data(), content->size())) return shortRead(path);
    Json json;
    auto const* const text = reinterpret_cast<char const*>(content->data());
    std::string wrong = JsonReader(text, text + content->size()).read(json);
    Record record;
    record.path = path;
    if (wrong.empty()) wrong = fillRecord(json, record);
    if (!wrong.empty()) {
        return Error{Code::kFORMAT, cat("is no record of an engine: ", wrong), shownPath(path), kBUILD_AGAIN};
    }
    return record;
}

Result<Record> checkPlan(std::string const& plan) noexcept {
    Result<Record> record = readRecord(plan);
    if (!record) return record;
    Result<Bytes> content = readPlan(plan, *record);
    if (!content) return content.error();
    return record;
}

// -- public: engines ------------------------------------------------------------------------------------------------

namespace {

struct Buffer {
    TensorInfo const* info = nullptr;
    CuPointer pointer = 0;
    bool isInput = false;
    bool isGiven = false;
};

} // namespace

struct Engine::Impl {
    Cuda cuda;
    Device device;
    Record record;
    std::string description;
    CuHandle context = nullptr;
    CuHandle stream = nullptr;
    CuHandle graph = nullptr;
    CuHandle graphExec = nullptr;
    std::array<CuHandle, 2> events{};
    LogFunction log = nullptr;
    void* logUser = nullptr;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::vector<nvinfer1::IPluginRegistry::PluginLibraryHandle> libraries;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> execution;
    std::vector<Buffer> buffers;

    Impl() = default;
    Impl(Impl const&) = delete;

    ~Impl() {
        if (context == nullptr) return;
        cuda.cuCtxPushCurrent_v2(context);
        if (stream != nullptr) cuda.cuStreamSynchronize(stream);
        if (graphExec != nullptr) cuda.cuGraphExecDestroy(graphExec);
        if (graph != nullptr) cuda.cuGraphDestroy(graph);
        execution.reset();
        engine.reset();
        for (auto const library : libraries) runtime->getPluginRegistry().deregisterLibrary(library);
        runtime.reset();
        for (Buffer const& buffer : buffers) {
            if (buffer.pointer != 0) cuda.cuMemFree_v2(buffer.pointer);
        }
        for (CuHandle const event : events) {
            if (event != nullptr) cuda.cuEventDestroy_v2(event);
        }
        if (stream != nullptr) cuda.cuStreamDestroy_v2(stream);
        CuHandle popped = nullptr;
        cuda.cuCtxPopCurrent_v2(&popped);
        cuda.cuDevicePrimaryCtxRelease_v2(device.handle);
    }

    Buffer* find(std::string const& name) noexcept {
        for (Buffer& buffer : buffers) {
            if (buffer.info->name == name) return &buffer;
        }
        return nullptr;
    }

    // The context that the CUDA runtime uses too, and TensorRT with it.
    Status retainContext() {
        int32_t const failed = cuda.cuDevicePrimaryCtxRetain(&context, device.handle);
        if (failed != 0) context = nullptr;
        return cuda.check(failed, "opening the GPU");
    }

    Status openStream() {
        int32_t failed = cuda.cuStreamCreate(&stream, kNON_BLOCKING);
        for (CuHandle& event : events) {
            if (failed == 0) failed = cuda.cuEventCreate(&event, 0);
        }
        return cuda.check(failed, "making a stream");
    }

    Status loadPlugins(std::vector<std::string> const& paths) {
        nvinfer1::IPluginRegistry& registry = runtime->getPluginRegistry();
        for (size_t i = 0; i < paths.size(); ++i) {
            PluginRecord const& plugin = record.plugins[i];
            auto const refused = [&](std::string const& why) {
                return Error{Code::kLIBRARY, why, shownPath(paths[i]),
                             "compile it on this machine: edgecomp plugin build"};
            };
            // TensorRT says only that it failed; this says why. The handle stays open, since layers may outlive it.
            if (::dlopen(paths[i].c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
                return refused(cat("does not load: ", ::dlerror()));
            }
            auto const library = registry.loadLibrary(paths[i].c_str());
            if (library == nullptr) return refused(cat("is refused by TensorRT: ", Logger::instance().errors()));
            libraries.push_back(library);
            size_t const colons = plugin.op.find("::");
            bool const plain = colons == std::string::npos;
            std::string const domain = plain ? "" : plugin.op.substr(0, colons);
            std::string const op = plain ? plugin.op : plugin.op.substr(colons + 2);
            if (registry.getCreator(op.c_str(), plugin.version.c_str(), domain.c_str()) == nullptr) {
                return refused(cat("registers no ", printable(plugin.op), " version ", printable(plugin.version)));
            }
        }
        return {};
    }

    Status deserialise(Bytes const& plan, std::string const& path) {
        auto const refused = [&](std::string const& why) {
            return Error{Code::kRUN, why, shownPath(path), "build the engine again on this machine (edgecomp build)"};
        };
        engine.reset(runtime->deserializeCudaEngine(plan.data(), plan.size()));
        if (engine == nullptr) return refused(cat("is refused by TensorRT: ", Logger::instance().errors()));
        size_t const count = record.inputs.size() + record.outputs.size();
        if (engine->getNbIOTensors() < 0 || static_cast<size_t>(engine->getNbIOTensors()) != count) {
            return refused(cat("has ", engine->getNbIOTensors(), " inputs and outputs, and its record ", count));
        }
        for (bool const isInput : {true, false}) {
            auto const mode = isInput ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
            for (TensorInfo const& info : isInput ? record.inputs : record.outputs) {
                std::string const difference = differs(*engine, info, mode);
                if (!difference.empty()) return refused(difference);
                buffers.push_back({&info, 0, isInput, false});
            }
        }
        execution.reset(engine->createExecutionContext());
        if (execution == nullptr) {
            return refused(cat("gives no execution context, often for lack of memory: ", Logger::instance().errors()));
        }
        return {};
    }

    Status bind() {
        for (Buffer& buffer : buffers) {
            size_t const bytes = std::max<size_t>(buffer.info->bytes(), 1);
            Status done = cuda.check(cuda.cuMemAlloc_v2(&buffer.pointer, bytes), "allocating a tensor on the GPU");
            if (!done) return done;
            done = cuda.check(cuda.cuMemsetD8Async(buffer.pointer, 0, bytes, stream), "clearing a tensor on the GPU");
            if (!done) return done;
            if (!execution->setTensorAddress(buffer.info->name.c_str(), reinterpret_cast<void*>(buffer.pointer))) {
                return Error{Code::kRUN, cat("TensorRT takes no address for ", quoted(buffer.info->name), ": ",
                                             Logger::instance().errors()), shownPath(record.path), kBUILD_AGAIN};
            }
        }
        return {};
    }

    Status enqueueOnce() {
        if (execution->enqueueV3(static_cast<cudaStream_t>(stream))) return {};
        return Error{Code::kRUN, cat("TensorRT does not run: ", Logger::instance().errors()), shownPath(record.path),
                     "build the engine again on this machine (edgecomp build)"};
    }

    // Runs once, as TensorRT asks for before a recording, and then records.
    Status recordGraph() {
        Status done = enqueueOnce();
        if (done) done = cuda.check(cuda.cuStreamSynchronize(stream), "the run before the recording");
        if (done) done = cuda.check(cuda.cuStreamBeginCapture_v2(stream, kTHREAD_LOCAL), "recording a CUDA graph");
        if (!done) return done;
        Status const recorded = enqueueOnce();
        int32_t const ended = cuda.cuStreamEndCapture(stream, &graph);
        if (!recorded) return recorded;
        char const* const advice = "this engine cannot be recorded; run it without the CUDA graph";
        done = cuda.check(ended, "recording a CUDA graph", advice);
        if (!done) return done;
        return cuda.check(cuda.cuGraphInstantiateWithFlags(&graphExec, graph, 0), "making a CUDA graph", advice);
    }
};

namespace {

// Makes the engine's context the current one while it lives, and says who gets the log.
class Current {
public:
    Current(Cuda const& cuda, CuHandle context, LogFunction log, void* user) : mCuda(cuda) {
        Logger::instance().begin(log, user);
        mCuda.cuCtxPushCurrent_v2(context);
    }
    Current(Current const&) = delete;
    ~Current() {
        CuHandle popped = nullptr;
        mCuda.cuCtxPopCurrent_v2(&popped);
    }

private:
    Cuda const& mCuda;
};

} // namespace

#define EDGECOMP_CURRENT Current const current(mImpl->cuda, mImpl->context, mImpl->log, mImpl->logUser)

Result<Engine> Engine::load(std::string const& plan, Options const& options) noexcept {
    auto impl = std::make_unique<Impl>();
    Result<Record> record = readRecord(plan);
    if (!record) return record.error();
    impl->record = std::move(*record);
    impl->log = options.log;
    impl->logUser = options.logUser;
    Version wanted{};
    if (!readVersion(impl->record.runtimeVersion, wanted)) {
        return Error{Code::kFORMAT, cat("runtime_version ", quoted(impl->record.runtimeVersion), " is no version"),
                     shownPath(impl->record.path), kBUILD_AGAIN};
    }
    Result<Bytes> content = readPlan(plan, impl->record);
    if (!content) return content.error();
    Result<std::vector<std::string>> plugins = matchPlugins(impl->record, options.plugins);
    if (!plugins) return plugins.error();

    bool const isRtx = impl->record.runtime == "rtx";
    Result<TensorRt> library = loadTensorRt(options.tensorrt, isRtx, wanted);
    if (!library) return library.error();
    if (Status done = requireVersion(impl->record, isRtx, wanted, *library); !done) return done.error();
    if (Status done = loadCuda(impl->cuda); !done) return done.error();
    Result<Device> device = openDevice(impl->cuda, options.device);
    if (!device) return device.error();
    impl->device = *device;
    if (Status done = requireSm(impl->record, impl->device); !done) return done.error();
    if (Status done = requireHeaders(*library); !done) return done.error();

    // From here on the interfaces are what the headers say.
    Status done = impl->retainContext();
    if (!done) return done.error();
    Current const current(impl->cuda, impl->context, impl->log, impl->logUser);
    done = impl->openStream();
    if (!done) return done.error();
    impl->runtime.reset(static_cast<nvinfer1::IRuntime*>(library->create(&Logger::instance(), NV_TENSORRT_VERSION)));
    if (impl->runtime == nullptr) {
        return Error{Code::kLIBRARY, cat("makes no runtime: ", Logger::instance().errors()), library->path,
                     "look whether its version and the driver fit"};
    }
    done = impl->loadPlugins(*plugins);
    if (done) done = impl->deserialise(*content, plan);
    if (done) done = impl->bind();
    if (done && options.cudaGraph) done = impl->recordGraph();
    if (done) done = impl->cuda.check(impl->cuda.cuStreamSynchronize(impl->stream), "preparing the GPU");
    if (!done) return done.error();
    impl->description = cat(library->text(), " on ", impl->device.name, " (SM", impl->device.sm, ")");
    return Engine(std::move(impl));
}

Engine::Engine(std::unique_ptr<Impl> impl) noexcept : mImpl(std::move(impl)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Record const& Engine::record() const noexcept { return mImpl->record; }

std::string const& Engine::description() const noexcept { return mImpl->description; }

void* Engine::stream() const noexcept { return mImpl->stream; }

void* Engine::deviceAddress(std::string const& name) noexcept {
    Buffer* const buffer = mImpl->find(name);
    if (buffer == nullptr) return nullptr;
    buffer->isGiven = true;
    return reinterpret_cast<void*>(buffer->pointer);
}

namespace {

std::string names(std::vector<TensorInfo> const& infos) {
    return joined(infos, [](TensorInfo const& info) { return quoted(info.name); });
}

Error unknownTensor(std::string const& name, char const* kind, std::vector<TensorInfo> const& known) {
    return {Code::kTENSOR, cat("there is no ", kind, " ", quoted(name), "; the engine has ", names(known)), "",
            "rename the tensor, or take another engine"};
}

} // namespace

Status Engine::setInput(std::string const& name, void const* data, size_t bytes) noexcept {
    Buffer* const buffer = mImpl->find(name);
    if (buffer == nullptr || !buffer->isInput) return unknownTensor(name, "input", inputs());
    if (bytes != buffer->info->bytes()) {
        return Error{Code::kTENSOR, cat("input ", quoted(name), " has ", bytes, " bytes, and the engine takes ",
                                        buffer->info->text(), ", ", buffer->info->bytes(), " bytes"), "",
                     "give it in that type and shape"};
    }
    EDGECOMP_CURRENT;
    Cuda const& cuda = mImpl->cuda;
    Status done =
        cuda.check(cuda.cuMemcpyHtoDAsync_v2(buffer->pointer, data, bytes, mImpl->stream), "copying an input");
    buffer->isGiven = static_cast<bool>(done);
    return done;
}

Status Engine::enqueue() noexcept {
    for (Buffer const& buffer : mImpl->buffers) {
        if (buffer.isInput && !buffer.isGiven) {
            return Error{Code::kTENSOR, cat("input ", quoted(buffer.info->name), " was not given"), "",
                         cat("the engine takes ", names(inputs()))};
        }
    }
    EDGECOMP_CURRENT;
    if (mImpl->graphExec == nullptr) return mImpl->enqueueOnce();
    return mImpl->cuda.check(mImpl->cuda.cuGraphLaunch(mImpl->graphExec, mImpl->stream), "replaying the CUDA graph");
}

Status Engine::synchronize() noexcept {
    EDGECOMP_CURRENT;
    return mImpl->cuda.check(mImpl->cuda.cuStreamSynchronize(mImpl->stream), "the inference");
}

Status Engine::getOutput(std::string const& name, void* data, size_t bytes) noexcept {
    Buffer* const buffer = mImpl->find(name);
    if (buffer == nullptr || buffer->isInput) return unknownTensor(name, "output", outputs());
    if (bytes != buffer->info->bytes()) {
        return Error{Code::kTENSOR, cat("output ", quoted(name), " is ", buffer->info->text(), ", ",
                                        buffer->info->bytes(), " bytes, and there is room for ", bytes), "",
                     "give as many bytes as it has"};
    }
    EDGECOMP_CURRENT;
    Cuda const& cuda = mImpl->cuda;
    Status done =
        cuda.check(cuda.cuMemcpyDtoHAsync_v2(data, buffer->pointer, bytes, mImpl->stream), "copying an output");
    if (done) done = cuda.check(cuda.cuStreamSynchronize(mImpl->stream), "the inference");
    return done;
}

Result<double> Engine::time() noexcept {
    Cuda const& cuda = mImpl->cuda;
    float milliseconds = 0;
    EDGECOMP_CURRENT;
    Status done = cuda.check(cuda.cuEventRecord(mImpl->events[0], mImpl->stream), "recording an event");
    if (done) done = enqueue();
    if (done) done = cuda.check(cuda.cuEventRecord(mImpl->events[1], mImpl->stream), "recording an event");
    if (done) done = cuda.check(cuda.cuStreamSynchronize(mImpl->stream), "the inference");
    auto const& [start, end] = mImpl->events;
    if (done) done = cuda.check(cuda.cuEventElapsedTime(&milliseconds, start, end), "reading the time");
    if (!done) return done.error();
    return static_cast<double>(milliseconds) * 1000.0;
}

Result<std::vector<Tensor>> Engine::infer(std::vector<Tensor> const& given) noexcept {
    for (size_t i = 0; i < given.size(); ++i) {
        TensorInfo const& info = given[i].info;
        Buffer const* const buffer = mImpl->find(info.name);
        if (buffer == nullptr || !buffer->isInput) return unknownTensor(info.name, "input", inputs());
        for (size_t other = 0; other < i; ++other) {
            if (given[other].info.name == info.name) {
                return Error{Code::kTENSOR, cat("input ", quoted(info.name), " is given twice"), "", "give it once"};
            }
        }
        if (info.type != buffer->info->type || info.shape != buffer->info->shape) {
            return Error{Code::kTENSOR, cat("input ", quoted(info.name), " is ", info.text(), ", and the engine takes ",
                                            buffer->info->text()), "",
                         "convert it: engines have fixed types and shapes, and nothing is cast in silence"};
        }
    }
    for (TensorInfo const& wanted : inputs()) {
        bool const there = std::any_of(given.begin(), given.end(),
                                       [&](Tensor const& tensor) { return tensor.info.name == wanted.name; });
        if (!there) {
            return Error{Code::kTENSOR, cat("input ", quoted(wanted.name), " (", wanted.text(), ") is missing; given: ",
                                            joined(given, [](Tensor const& t) { return quoted(t.info.name); })), "",
                         "give every input of the engine"};
        }
    }
    Status done;
    for (Tensor const& tensor : given) {
        if (done) done = setInput(tensor.info.name, tensor.data.data(), tensor.data.size());
    }
    if (done) done = enqueue();
    if (!done) return done.error();
    std::vector<Tensor> results;
    for (TensorInfo const& info : outputs()) {
        Result<Bytes> data = Bytes::allocate(info.bytes(), "an output");
        if (!data) return data.error();
        results.push_back({info, std::move(*data)});
        done = getOutput(info.name, results.back().data.data(), results.back().data.size());
        if (!done) return done.error();
    }
    return results;
}

} // namespace edgecomp
