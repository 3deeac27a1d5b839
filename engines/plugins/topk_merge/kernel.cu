// edgecomp::TopKMerge on CUDA; README.md is the definition, index.h decides which token goes where.
//
//   match_tiles   a 64 x 64 tile of similarities at a time, on tensor cores where the type has them; each source keeps
//                 its best destination, so the scores never leave the chip
//   group_sample  one block a sample: select r, and list the sources of each destination
//   merge_rows    one warp a row, or a piece of a row: gather and merge in one pass
//   rank_sample   `by_score` alone, before the others
//
// Every result is a sum in a fixed order or a minimum over distinct integers: two runs give the same bits.

#include "kernel.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <type_traits>

#include "index.h"

// Bytes of the block; a launch says how many. Tensor cores want their tiles aligned to 32.
extern __shared__ __align__(128) unsigned char edgecomp_shared[];

namespace edgecomp {
namespace {

using Params = edgecomp_topk_merge_params;

constexpr int kTile = 64;                // sources and destinations of a tile
constexpr int kThreads = 256;            // of match_tiles: four a row of the tile
constexpr int kRowThreads = 4;
constexpr int kScoreStride = kTile + 4;  // floats; keeps the columns of a warp's rows in different banks
constexpr int kWarp = 32;
constexpr int kLargestBlock = 1024;
constexpr int kMergeWarps = 8;
constexpr int kWantedBlocks = 512;  // enough for the largest GPU; fewer tiles are not split further
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr size_t kAlignment = 256;

enum Error {
    kFine,
    kNullPointer,
    kBatch,
    kTokens,
    kMetricWidth,
    kWidth,
    kPrefix,
    kR,
    kAttribute,
    kDtype,
    kWorkspace,
    kScores,
    kCuda = 1000,
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T values[V];
};

// Whether this compilation multiplies T on tensor cores: fp16 from SM75, bf16 from SM80. fp32 never, because TF32
// would not be the definition's float32.
template <typename T>
__device__ constexpr bool has_tensor_cores() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    return std::is_same<T, __half>::value;
#else
    return !std::is_same<T, float>::value;
#endif
}

// Where the parts of the workspace begin, in bytes, and how the destinations are split among blocks.
struct Workspace {
    int32_t source_tiles;
    int32_t tiles_per_split;
    int32_t splits;
    size_t matches;
    size_t ranked;
    size_t row_token;
    size_t begin;
    size_t merged;
    size_t bytes;
};

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

Workspace make_workspace(const Params& p, const Layout& s) {
    Workspace w{};
    const int32_t destination_tiles = ceil_div(s.destinations, kTile);
    w.source_tiles = ceil_div(s.sources, kTile);
    const int32_t wanted = ceil_div(kWantedBlocks, p.batch * w.source_tiles);
    w.tiles_per_split = ceil_div(destination_tiles, wanted < destination_tiles ? wanted : destination_tiles);
    w.splits = ceil_div(destination_tiles, w.tiles_per_split);
    const auto take = [&w](size_t count, size_t size) {
        const size_t at = w.bytes;
        w.bytes = (at + count * size + kAlignment - 1) / kAlignment * kAlignment;
        return at;
    };
    const size_t batch = static_cast<size_t>(p.batch);
    w.matches = take(batch * w.splits * s.sources, sizeof(uint64_t));
    w.ranked = take(p.partition == EDGECOMP_BY_SCORE ? batch * s.candidates : 0, sizeof(int32_t));
    w.row_token = take(batch * s.rows, sizeof(int32_t));
    w.begin = take(batch * (s.destinations + 1), sizeof(int32_t));
    w.merged = take(batch * p.r, sizeof(int32_t));
    return w;
}

struct BlockBarrier {
    __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

__device__ __forceinline__ Groups groups_of(const Params& p, const Layout& s, int32_t* row_token, int32_t* begin,
                                            int32_t* merged, int32_t sample) {
    return Groups{row_token + static_cast<size_t>(sample) * s.rows,
                  begin + static_cast<size_t>(sample) * (s.destinations + 1),
                  merged + static_cast<size_t>(sample) * p.r};
}

__global__ void __launch_bounds__(kLargestBlock) rank_sample(Params p, Layout s, const float* scores, int32_t* ranked) {
    const int32_t sample = blockIdx.x;
    rank_by_score(p, s, scores + static_cast<size_t>(sample) * p.tokens, reinterpret_cast<uint64_t*>(edgecomp_shared),
                  ranked + static_cast<size_t>(sample) * s.candidates, threadIdx.x, blockDim.x, BlockBarrier{});
}

__global__ void __launch_bounds__(kLargestBlock)
    group_sample(Params p, Layout s, int32_t splits, const uint64_t* matches, const int32_t* ranked,
                 int32_t* row_token, int32_t* begin, int32_t* merged, int32_t* src_map) {
    const int32_t sample = blockIdx.x;
    group_tokens(p, s, matches + static_cast<size_t>(sample) * splits * s.sources, splits,
                 ranked + static_cast<size_t>(sample) * s.candidates, reinterpret_cast<uint64_t*>(edgecomp_shared),
                 groups_of(p, s, row_token, begin, merged, sample),
                 src_map ? src_map + static_cast<size_t>(sample) * p.tokens : nullptr, threadIdx.x, blockDim.x,
                 BlockBarrier{});
}

// Reads `Count` elements of a row from column `from`; zeros behind its end, and everywhere without a row.
template <typename T, int Count>
__device__ __forceinline__ void load_elements(const T* row, int32_t from, int32_t width, bool aligned, T* values) {
    constexpr int kVector = 16 / sizeof(T);
    if (row != nullptr && aligned && from + Count <= width) {
#pragma unroll
        for (int i = 0; i < Count; i += kVector) {
            const auto pack = *reinterpret_cast<const Pack<T, kVector>*>(row + from + i);
#pragma unroll
            for (int j = 0; j < kVector; ++j) values[i + j] = pack.values[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < Count; ++i) {
        values[i] = row != nullptr && from + i < width ? row[from + i] : from_float<T>(0.0f);
    }
}

// Adds up over the four threads of a row; all four get the same bits.
__device__ __forceinline__ float sum_of_row(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
}

__device__ __forceinline__ float inverse_norm(float sum_of_squares) {
    return sum_of_squares == 0.0f ? 0.0f : 1.0f / sqrtf(sum_of_squares);
}

// Dot products of a tile on CUDA cores: a thread has rows 4y..4y+3 and columns 4x..4x+3.
template <typename T>
struct TileOnCores {
    static constexpr int kDepth = 32;
    static constexpr int kStride = kTile + 4;
    using Staged = float;
    static constexpr size_t kStagedBytes = 2 * kDepth * kStride * sizeof(float);
    float sums[4][4] = {};

    __device__ __forceinline__ static void stage(Staged* tile, int row, int from, const T* values) {
#pragma unroll
        for (int i = 0; i < kDepth / kRowThreads; ++i) tile[(from + i) * kStride + row] = to_float(values[i]);
    }

    __device__ __forceinline__ void multiply(const Staged* sources, const Staged* destinations) {
        const int y = threadIdx.x / 16 * 4;
        const int x = threadIdx.x % 16 * 4;
#pragma unroll 4
        for (int k = 0; k < kDepth; ++k) {
            const auto a = *reinterpret_cast<const Pack<float, 4>*>(sources + k * kStride + y);
            const auto b = *reinterpret_cast<const Pack<float, 4>*>(destinations + k * kStride + x);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(a.values[i], b.values[j], sums[i][j]);
            }
        }
    }

    __device__ __forceinline__ void store(float* scores) {
        const int y = threadIdx.x / 16 * 4;
        const int x = threadIdx.x % 16 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[(y + i) * kScoreStride + x + j] = sums[i][j];
                sums[i][j] = 0.0f;
            }
        }
    }
};

// Dot products of a tile on tensor cores, summed in float32: a warp has 16 rows and 32 columns.
template <typename T>
struct TileOnTensorCores {
    static constexpr int kDepth = 64;
    static constexpr int kStride = kDepth + 8;
    using Staged = T;
    static constexpr size_t kStagedBytes = 2 * kTile * kStride * sizeof(T);
    using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
    Sums sums[2];

    __device__ __forceinline__ TileOnTensorCores() { clear(); }

    __device__ __forceinline__ void clear() {
        nvcuda::wmma::fill_fragment(sums[0], 0.0f);
        nvcuda::wmma::fill_fragment(sums[1], 0.0f);
    }

    __device__ __forceinline__ static void stage(Staged* tile, int row, int from, const T* values) {
        constexpr int kVector = 16 / sizeof(T);
#pragma unroll
        for (int i = 0; i < kDepth / kRowThreads; i += kVector) {
            Pack<T, kVector> pack;
#pragma unroll
            for (int j = 0; j < kVector; ++j) pack.values[j] = values[i + j];
            *reinterpret_cast<Pack<T, kVector>*>(tile + row * kStride + from + i) = pack;
        }
    }

    __device__ __forceinline__ void multiply(const Staged* sources, const Staged* destinations) {
        using namespace nvcuda;
        const int y = threadIdx.x / kWarp % 4 * 16;
        const int x = threadIdx.x / kWarp / 4 * 32;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
            wmma::load_matrix_sync(a, sources + y * kStride + k, kStride);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
                wmma::load_matrix_sync(b, destinations + (x + 16 * half) * kStride + k, kStride);
                wmma::mma_sync(sums[half], a, b, sums[half]);
            }
        }
    }

    __device__ __forceinline__ void store(float* scores) {
        using namespace nvcuda;
        const int y = threadIdx.x / kWarp % 4 * 16;
        const int x = threadIdx.x / kWarp / 4 * 32;
        wmma::store_matrix_sync(scores + y * kScoreStride + x, sums[0], kScoreStride, wmma::mem_row_major);
        wmma::store_matrix_sync(scores + y * kScoreStride + x + 16, sums[1], kScoreStride, wmma::mem_row_major);
        clear();
    }
};

constexpr size_t kScoreBytes = kTile * kScoreStride * sizeof(float);
constexpr size_t kNormBytes = 2 * kTile * sizeof(float);
constexpr size_t kTileBytes = 2 * kTile * 72 * 2;  // the larger of the two stages; also scores lie here in their turn
static_assert(kTileBytes >= kScoreBytes && kTileBytes >= TileOnCores<float>::kStagedBytes, "the tiles share memory");

// Finds the best destination of 64 sources among the destinations of one split.
template <typename T, template <typename> class Tile>
__device__ __forceinline__ void match_tile(const Params& p, const Layout& s, const T* metric, const int32_t* ranked,
                                           bool aligned, int32_t first_tile, int32_t tiles, uint64_t* matches) {
    constexpr int kPiece = Tile<T>::kDepth / kRowThreads;  // elements that a thread loads
    using Staged = typename Tile<T>::Staged;
    auto* const staged_sources = reinterpret_cast<Staged*>(edgecomp_shared);
    auto* const staged_destinations = staged_sources + Tile<T>::kStagedBytes / sizeof(Staged) / 2;
    auto* const scores = reinterpret_cast<float*>(edgecomp_shared);
    auto* const source_inverse = reinterpret_cast<float*>(edgecomp_shared + kTileBytes);
    auto* const destination_inverse = source_inverse + kTile;

    const int row = threadIdx.x / kRowThreads;
    const int quarter = threadIdx.x % kRowThreads;
    const int32_t source = blockIdx.x * kTile + row;
    const T* const source_row =
        source < s.sources ? metric + static_cast<size_t>(source_token(p, s, ranked, source)) * p.metric_width : nullptr;
    uint64_t best = kLast;
    Tile<T> tile;

    for (int32_t t = first_tile; t < first_tile + tiles && t * kTile < s.destinations; ++t) {
        const int32_t destination = t * kTile + row;
        const T* const destination_row =
            destination < s.destinations
                ? metric + static_cast<size_t>(destination_token(p, s, ranked, destination)) * p.metric_width
                : nullptr;
        float source_squares = 0.0f;
        float destination_squares = 0.0f;
        for (int32_t from = 0; from < p.metric_width; from += Tile<T>::kDepth) {
            T a[kPiece];
            T b[kPiece];
            load_elements<T, kPiece>(source_row, from + quarter * kPiece, p.metric_width, aligned, a);
            load_elements<T, kPiece>(destination_row, from + quarter * kPiece, p.metric_width, aligned, b);
#pragma unroll
            for (int i = 0; i < kPiece; ++i) {
                source_squares = fmaf(to_float(a[i]), to_float(a[i]), source_squares);
                destination_squares = fmaf(to_float(b[i]), to_float(b[i]), destination_squares);
            }
            __syncthreads();  // the last piece, or the last tile's scores, have been read
            Tile<T>::stage(staged_sources, row, quarter * kPiece, a);
            Tile<T>::stage(staged_destinations, row, quarter * kPiece, b);
            __syncthreads();
            tile.multiply(staged_sources, staged_destinations);
        }
        source_squares = sum_of_row(source_squares);
        destination_squares = sum_of_row(destination_squares);
        if (quarter == 0) {
            source_inverse[row] = inverse_norm(source_squares);
            destination_inverse[row] = inverse_norm(destination_squares);
        }
        __syncthreads();
        tile.store(scores);
        __syncthreads();
        const float inverse = source_inverse[row];
#pragma unroll 4
        for (int i = 0; i < kTile / kRowThreads; ++i) {
            const int column = i * kRowThreads + quarter;
            const int32_t position = t * kTile + column;
            if (position < s.destinations) {
                const float similarity = scores[row * kScoreStride + column] * inverse * destination_inverse[column];
                const uint64_t key = descending_key(similarity, static_cast<uint32_t>(position));
                best = key < best ? key : best;
            }
        }
    }
    for (int lane = 1; lane < kRowThreads; lane *= 2) {
        const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(best), lane);
        best = other < best ? other : best;
    }
    if (quarter == 0 && source < s.sources) matches[source] = best;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    match_tiles(Params p, Layout s, const T* metric, const int32_t* ranked, bool aligned, int32_t tiles_per_split,
                uint64_t* matches) {
    const size_t sample = blockIdx.z;
    metric += sample * p.tokens * p.metric_width;
    ranked += sample * s.candidates;
    matches += (sample * gridDim.y + blockIdx.y) * s.sources;
    const int32_t first_tile = blockIdx.y * tiles_per_split;
    if constexpr (has_tensor_cores<T>()) {
        match_tile<T, TileOnTensorCores>(p, s, metric, ranked, aligned, first_tile, tiles_per_split, matches);
    } else {
        match_tile<T, TileOnCores>(p, s, metric, ranked, aligned, first_tile, tiles_per_split, matches);
    }
}

__device__ __forceinline__ float sum_of_warp(float value) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
    return value;
}

template <typename T, int V>
__device__ __forceinline__ float norm_of_row(const T* row, int32_t vectors, int lane) {
    float squares = 0.0f;
    for (int32_t i = lane; i < vectors; i += kWarp) {
        const auto pack = reinterpret_cast<const Pack<T, V>*>(row)[i];
#pragma unroll
        for (int j = 0; j < V; ++j) squares = fmaf(to_float(pack.values[j]), to_float(pack.values[j]), squares);
    }
    return sqrtf(sum_of_warp(squares));
}

// One warp: row `item / pieces` of the output, every `pieces`-th run of 32 vectors from run `item % pieces` on.
template <typename T, int V>
__global__ void __launch_bounds__(kMergeWarps* kWarp, 4)
    merge_rows(Params p, Layout s, int32_t pieces, const T* x, const float* size, int32_t* row_token, int32_t* begin,
               int32_t* merged, T* y, float* merged_size) {
    const int lane = threadIdx.x % kWarp;
    const int32_t item = blockIdx.x * kMergeWarps + threadIdx.x / kWarp;
    const int32_t row = item / pieces;
    const int32_t piece = item % pieces;
    const int32_t sample = blockIdx.y;
    if (row >= s.rows) return;
    const Groups groups = groups_of(p, s, row_token, begin, merged, sample);
    const size_t first_token = static_cast<size_t>(sample) * p.tokens;
    const int32_t own = groups.row_token[row];
    const int32_t destination = row - s.first_destination_row;
    const int32_t from = destination < 0 ? 0 : groups.begin[destination];
    const int32_t to = destination < 0 ? 0 : groups.begin[destination + 1];

    float total = 0.0f;
    if (size != nullptr) {
        total = size[first_token + own];
#pragma unroll 1
        for (int32_t i = from; i < to; ++i) total += size[first_token + groups.merged[i]];
    }
    if (merged_size != nullptr && piece == 0 && lane == 0) {
        merged_size[static_cast<size_t>(sample) * s.rows + row] = total;
    }
    if (y == nullptr) return;

    const int32_t vectors = p.width / V;
    const T* const own_row = x + (first_token + own) * p.width;
    auto* const out = reinterpret_cast<Pack<T, V>*>(y + (static_cast<size_t>(sample) * s.rows + row) * p.width);
    if (from == to || p.mode == EDGECOMP_PRUNE) {
        for (int32_t i = piece * kWarp + lane; i < vectors; i += pieces * kWarp) {
            out[i] = reinterpret_cast<const Pack<T, V>*>(own_row)[i];
        }
        return;
    }

    const bool weighted = p.mode == EDGECOMP_WAVG;
    const float own_weight = weighted ? size[first_token + own] : 1.0f;
    const float divisor = weighted ? total : p.mode == EDGECOMP_SUM ? 1.0f : static_cast<float>(to - from + 1);
    float scale = 1.0f;
    if (p.mode == EDGECOMP_TOFU) {
        const float norm = norm_of_row<T, V>(own_row, vectors, lane);
        float largest = norm;
#pragma unroll 1
        for (int32_t i = from; i < to; ++i) {
            const T* const source_row = x + (first_token + groups.merged[i]) * p.width;
            largest = fmaxf(largest, norm_of_row<T, V>(source_row, vectors, lane));
        }
        scale = norm == 0.0f ? 1.0f : largest / norm;
    }
    for (int32_t i = piece * kWarp + lane; i < vectors; i += pieces * kWarp) {
        auto pack = reinterpret_cast<const Pack<T, V>*>(own_row)[i];
        float sums[V];
#pragma unroll
        for (int j = 0; j < V; ++j) sums[j] = own_weight * to_float(pack.values[j]);
#pragma unroll 2
        for (int32_t k = from; k < to; ++k) {
            const int32_t token = groups.merged[k];
            const float weight = weighted ? size[first_token + token] : 1.0f;
            const auto other = reinterpret_cast<const Pack<T, V>*>(x + (first_token + token) * p.width)[i];
#pragma unroll
            for (int j = 0; j < V; ++j) sums[j] = fmaf(weight, to_float(other.values[j]), sums[j]);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) pack.values[j] = from_float<T>(sums[j] / divisor * scale);
        out[i] = pack;
    }
}

template <typename... Expected, typename... Given>
cudaError_t launch(void (*kernel)(Expected...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   Given... given) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Expected>(given)...);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Enough threads that each has one pair of the sort, in whole warps.
int sort_threads(int32_t keys) { return keys / 2 < kWarp ? kWarp : keys / 2 > kLargestBlock ? kLargestBlock : keys / 2; }

template <typename T>
cudaError_t merge(const Params& p, const Layout& s, cudaStream_t stream, const void* x, const float* size,
                  int32_t* row_token, int32_t* begin, int32_t* merged, void* y, float* merged_size) {
    constexpr int kVector = 16 / sizeof(T);
    const bool wide = p.width % kVector == 0 && is_aligned(x) && is_aligned(y);
    const int32_t vectors = wide ? p.width / kVector : p.width;
    const int32_t pieces = y == nullptr || p.mode == EDGECOMP_TOFU ? 1 : ceil_div(vectors, kWarp);
    const dim3 grid(ceil_div(s.rows * pieces, kMergeWarps), p.batch);
    return launch(wide ? merge_rows<T, kVector> : merge_rows<T, 1>, grid, kMergeWarps * kWarp, 0, stream, p, s, pieces,
                  static_cast<const T*>(x), size, row_token, begin, merged, static_cast<T*>(y), merged_size);
}

template <typename T>
cudaError_t run(const Params& p, cudaStream_t stream, const void* metric, const void* x, const float* size,
                const float* scores, void* y, float* merged_size, int32_t* src_map, unsigned char* workspace) {
    const Layout s = make_layout(p);
    const Workspace w = make_workspace(p, s);
    auto* const matches = reinterpret_cast<uint64_t*>(workspace + w.matches);
    auto* const ranked = reinterpret_cast<int32_t*>(workspace + w.ranked);
    auto* const row_token = reinterpret_cast<int32_t*>(workspace + w.row_token);
    auto* const begin = reinterpret_cast<int32_t*>(workspace + w.begin);
    auto* const merged = reinterpret_cast<int32_t*>(workspace + w.merged);
    const int32_t keys = largest_keys(p, s);
    const size_t key_bytes = static_cast<size_t>(keys) * sizeof(uint64_t);

    if (p.partition == EDGECOMP_BY_SCORE) {
        const cudaError_t error =
            launch(rank_sample, dim3(p.batch), sort_threads(keys), key_bytes, stream, p, s, scores, ranked);
        if (error != cudaSuccess) return error;
    }
    const bool aligned = is_aligned(metric) && p.metric_width * sizeof(T) % 16 == 0;
    cudaError_t error = launch(match_tiles<T>, dim3(w.source_tiles, w.splits, p.batch), kThreads,
                               kTileBytes + kNormBytes, stream, p, s, static_cast<const T*>(metric), ranked, aligned,
                               w.tiles_per_split, matches);
    if (error != cudaSuccess) return error;
    error = launch(group_sample, dim3(p.batch), sort_threads(keys), key_bytes, stream, p, s, w.splits, matches, ranked,
                   row_token, begin, merged, src_map);
    if (error != cudaSuccess || (y == nullptr && merged_size == nullptr)) return error;
    return merge<T>(p, s, stream, x, size, row_token, begin, merged, y, merged_size);
}

bool is_between(int32_t value, int32_t least, int32_t most) { return value >= least && value <= most; }

}  // namespace
}  // namespace edgecomp

extern "C" int edgecomp_topk_merge_check(const edgecomp_topk_merge_params* params) {
    using namespace edgecomp;
    if (params == nullptr) return kNullPointer;
    const auto& p = *params;
    if (!is_between(p.batch, 1, EDGECOMP_LARGEST_BATCH)) return kBatch;
    if (!is_between(p.tokens, 2, EDGECOMP_LARGEST_TOKENS)) return kTokens;
    if (!is_between(p.metric_width, 1, EDGECOMP_LARGEST_WIDTH)) return kMetricWidth;
    if (!is_between(p.width, 1, EDGECOMP_LARGEST_WIDTH)) return kWidth;
    if (!is_between(p.num_prefix_tokens, 0, p.tokens - 2)) return kPrefix;
    if (!is_between(p.r, 1, (p.tokens - p.num_prefix_tokens) / 2)) return kR;
    if (!is_between(p.mode, EDGECOMP_WAVG, EDGECOMP_TOFU)) return kAttribute;
    if (!is_between(p.partition, EDGECOMP_ALTERNATE, EDGECOMP_BY_SCORE)) return kAttribute;
    if (!is_between(p.order, EDGECOMP_ASCENDING, EDGECOMP_RANK)) return kAttribute;
    if (!is_between(p.dtype, EDGECOMP_FLOAT32, EDGECOMP_BFLOAT16)) return kDtype;
    return kFine;
}

extern "C" size_t edgecomp_topk_merge_workspace(const edgecomp_topk_merge_params* params) {
    if (edgecomp_topk_merge_check(params) != 0) return 0;
    return edgecomp::make_workspace(*params, edgecomp::make_layout(*params)).bytes;
}

extern "C" int edgecomp_topk_merge(void* stream, const edgecomp_topk_merge_params* params, const void* metric,
                                   const void* x, const float* size, const float* scores, void* y, float* merged_size,
                                   int32_t* src_map, void* workspace, size_t workspace_bytes) {
    using namespace edgecomp;
    const int wrong = edgecomp_topk_merge_check(params);
    if (wrong != 0) return wrong;
    const auto& p = *params;
    const bool needs_size = merged_size != nullptr || (y != nullptr && p.mode == EDGECOMP_WAVG);
    if (metric == nullptr || workspace == nullptr || (y != nullptr && x == nullptr)) return kNullPointer;
    if (needs_size && size == nullptr) return kNullPointer;
    if (p.partition == EDGECOMP_BY_SCORE && scores == nullptr) return kScores;
    if (workspace_bytes < edgecomp_topk_merge_workspace(params)) return kWorkspace;
    if (reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0) return kWorkspace;
    const auto queue = static_cast<cudaStream_t>(stream);
    auto* const space = static_cast<unsigned char*>(workspace);
    const auto chosen = p.dtype == EDGECOMP_FLOAT32   ? run<float>
                        : p.dtype == EDGECOMP_FLOAT16 ? run<__half>
                                                      : run<__nv_bfloat16>;
    const cudaError_t error = chosen(p, queue, metric, x, size, scores, y, merged_size, src_map, space);
    return error == cudaSuccess ? kFine : kCuda + static_cast<int>(error);
}

extern "C" const char* edgecomp_topk_merge_error(int code) {
    using namespace edgecomp;
    if (code >= kCuda) return cudaGetErrorString(static_cast<cudaError_t>(code - kCuda));
    switch (code) {
        case kFine:
            return "no error";
        case kNullPointer:
            return "a pointer that this call needs is NULL";
        case kBatch:
            return "batch is not between 1 and 1024";
        case kTokens:
            return "tokens is not between 2 and 4096";
        case kMetricWidth:
            return "metric_width is not between 1 and 4096";
        case kWidth:
            return "width is not between 1 and 4096";
        case kPrefix:
            return "num_prefix_tokens is not between 0 and tokens - 2";
        case kR:
            return "r is not between 1 and half of the tokens behind the prefix";
        case kAttribute:
            return "mode, partition or order is unknown";
        case kDtype:
            return "dtype is not float32, float16 or bfloat16";
        case kWorkspace:
            return "the workspace is smaller than edgecomp_topk_merge_workspace says, or not aligned to 256 bytes";
        case kScores:
            return "partition by_score needs scores";
        default:
            return "an unknown code";
    }
}
