// Rank, select and source lists: everything that decides which token goes where. Integers alone, so that a GPU and a
// host compute the same bits; nvcc and any C++17 compiler accept it, and the tests run it on the host.
//
// A block of threads works through one sample. On the host the "block" is one thread, and `sync` does nothing.
#ifndef EDGECOMP_TOPK_MERGE_INDEX_H
#define EDGECOMP_TOPK_MERGE_INDEX_H

#include <cstdint>
#include <cstring>

#include "kernel.h"

#if defined(__CUDACC__)
#define EDGECOMP_HD __host__ __device__ __forceinline__
#else
#define EDGECOMP_HD inline
#endif

namespace edgecomp {

constexpr uint64_t kLast = ~uint64_t{0};  // sorts behind every key
constexpr uint64_t kUnmerged = 0xFFFF;    // stands where a destination's position would; above all positions

// The sizes that follow from the parameters.
struct Layout {
    int32_t candidates;
    int32_t sources;
    int32_t destinations;
    int32_t unmerged;           // candidates that are neither merged nor destinations
    int32_t rows;               // M
    int32_t first_source;       // `alternate`: token of source 0; the others follow in steps of two
    int32_t first_destination;  // likewise
    int32_t first_destination_row;
};

EDGECOMP_HD Layout make_layout(const edgecomp_topk_merge_params& p) {
    Layout s{};
    const int32_t odd = p.num_prefix_tokens & 1;
    s.candidates = p.tokens - p.num_prefix_tokens;
    if (p.partition == EDGECOMP_ALTERNATE) {
        s.sources = (p.tokens + 1) / 2 - (p.num_prefix_tokens + 1) / 2;
        s.destinations = p.tokens / 2 - p.num_prefix_tokens / 2;
        s.first_source = p.num_prefix_tokens + odd;
        s.first_destination = p.num_prefix_tokens + 1 - odd;
    } else {
        s.sources = s.destinations = p.r;
    }
    s.rows = p.tokens - p.r;
    s.unmerged = s.candidates - p.r - s.destinations;
    s.first_destination_row = p.num_prefix_tokens + s.unmerged;
    return s;
}

// Where the tokens of one sample stand. In `alternate`, `ranked` is not read.
EDGECOMP_HD int32_t source_token(const edgecomp_topk_merge_params& p, const Layout& s, const int32_t* ranked,
                                 int32_t source) {
    return p.partition == EDGECOMP_ALTERNATE ? s.first_source + 2 * source : ranked[2 * source];
}

EDGECOMP_HD int32_t destination_token(const edgecomp_topk_merge_params& p, const Layout& s, const int32_t* ranked,
                                      int32_t destination) {
    return p.partition == EDGECOMP_ALTERNATE ? s.first_destination + 2 * destination : ranked[2 * destination + 1];
}

// A key whose ascending order is descending `value`, ties by ascending `position`. NaN comes last, and -0 equals 0.
// No two keys are equal, so every way of sorting gives the same order, and a minimum needs no order of comparisons.
EDGECOMP_HD uint64_t descending_key(float value, uint32_t position) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t rising = (bits & 0x80000000u) && magnitude ? ~bits : magnitude | 0x80000000u;
    if (magnitude > 0x7F800000u) rising = 0;
    return static_cast<uint64_t>(~rising) << 32 | position;
}

EDGECOMP_HD int32_t power_of_two_from(int32_t count) {
    int32_t size = 1;
    while (size < count) size *= 2;
    return size;
}

// Sorts `size` keys (a power of two) ascending: a bitonic network. Synchronises before it returns.
template <typename Sync>
EDGECOMP_HD void sort_keys(uint64_t* keys, int32_t size, int32_t thread, int32_t threads, Sync sync) {
    for (int32_t run = 2; run <= size; run *= 2) {
        for (int32_t stride = run / 2; stride > 0; stride /= 2) {
            for (int32_t pair = thread; pair < size / 2; pair += threads) {
                const int32_t low = 2 * pair - (pair & (stride - 1));
                const int32_t high = low + stride;
                const uint64_t a = keys[low];
                const uint64_t b = keys[high];
                if ((a > b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
            sync();
        }
    }
}

// `by_score`: writes the candidates' tokens in descending order of score. `scores` and `ranked` are of one sample;
// `keys` has room for power_of_two_from(candidates).
template <typename Sync>
EDGECOMP_HD void rank_by_score(const edgecomp_topk_merge_params& p, const Layout& s, const float* scores,
                               uint64_t* keys, int32_t* ranked, int32_t thread, int32_t threads, Sync sync) {
    const int32_t size = power_of_two_from(s.candidates);
    for (int32_t i = thread; i < size; i += threads) {
        const int32_t token = p.num_prefix_tokens + i;
        keys[i] = i < s.candidates ? descending_key(scores[token], static_cast<uint32_t>(token)) : kLast;
    }
    sync();
    sort_keys(keys, size, thread, threads, sync);
    for (int32_t i = thread; i < s.candidates; i += threads) ranked[i] = static_cast<int32_t>(keys[i] & 0xFFFFu);
}

// What a sample's rows are made of.
struct Groups {
    int32_t* row_token;  // [M] the token that a row keeps: an unmerged one, or a destination
    int32_t* begin;      // [destinations + 1] where a destination's sources begin in `merged`
    int32_t* merged;     // [r] tokens that disappear: by destination, within it in the order of step 1
};

EDGECOMP_HD int32_t count_below(const uint64_t* keys, int32_t count, uint64_t limit) {
    int32_t low = 0;
    while (low < count) {
        const int32_t middle = (low + count) / 2;
        if (keys[middle] < limit) {
            low = middle + 1;
        } else {
            count = middle;
        }
    }
    return low;
}

// Selects what merges and writes one sample's groups.
//
// matches: [splits][sources] keys of descending similarity over the destination's position, a minimum over a part of
//     the destinations each; the smallest of a source is its match.
// ranked: from rank_by_score; not read in `alternate`.
// keys: room for power_of_two_from(largest_keys(s)).
// src_map: [N], or NULL.
template <typename Sync>
EDGECOMP_HD void group_tokens(const edgecomp_topk_merge_params& p, const Layout& s, const uint64_t* matches,
                              int32_t splits, const int32_t* ranked, uint64_t* keys, Groups groups, int32_t* src_map,
                              int32_t thread, int32_t threads, Sync sync) {
    const bool alternate = p.partition == EDGECOMP_ALTERNATE;
    const bool by_rank = p.order == EDGECOMP_RANK;
    const int32_t count = p.r + s.unmerged;  // `alternate`: all sources
    const int32_t size = power_of_two_from(count);

    // After this, key i is (destination or kUnmerged, what orders within it, where the token stands), 16 bits each.
    for (int32_t i = thread; i < size; i += threads) {
        uint64_t key = kLast;
        if (i < s.sources) {
            for (int32_t split = 0; split < splits; ++split) {
                const uint64_t match = matches[static_cast<int64_t>(split) * s.sources + i];
                key = match < key ? match : key;
            }
            const uint64_t destination = key & 0xFFFFu;
            const uint64_t position = static_cast<uint64_t>(i);
            key = alternate ? (key & ~uint64_t{0xFFFFFFFF}) | position << 16 | destination
                            : destination << 32 | position << 16 | 2 * position;
        } else if (i < count) {  // `by_score` alone
            const int32_t position = i + p.r;
            const int32_t order = by_rank ? position : ranked[position];
            key = kUnmerged << 32 | static_cast<uint64_t>(order) << 16 | static_cast<uint64_t>(position);
        }
        keys[i] = key;
    }
    sync();
    if (alternate) {
        sort_keys(keys, size, thread, threads, sync);
        for (int32_t i = thread; i < count; i += threads) {
            const uint64_t position = keys[i] >> 16 & 0xFFFFu;
            const uint64_t group = i < p.r ? keys[i] & 0xFFFFu : kUnmerged;
            const uint64_t order = i >= p.r && by_rank ? static_cast<uint64_t>(i) : position;
            keys[i] = group << 32 | order << 16 | position;
        }
        sync();
    }
    sort_keys(keys, size, thread, threads, sync);

    for (int32_t i = thread; i < p.num_prefix_tokens; i += threads) {
        groups.row_token[i] = i;
        if (src_map) src_map[i] = i;
    }
    for (int32_t i = thread; i < count; i += threads) {
        const int32_t position = static_cast<int32_t>(keys[i] & 0xFFFFu);
        const int32_t token = alternate ? s.first_source + 2 * position : ranked[position];
        int32_t row;
        if (i < p.r) {
            groups.merged[i] = token;
            row = s.first_destination_row + static_cast<int32_t>(keys[i] >> 32);
        } else {
            row = p.num_prefix_tokens + i - p.r;
            groups.row_token[row] = token;
        }
        if (src_map) src_map[token] = row;
    }
    for (int32_t i = thread; i <= s.destinations; i += threads) {
        groups.begin[i] = count_below(keys, p.r, static_cast<uint64_t>(i) << 32);
        if (i == s.destinations) break;
        const int32_t token = destination_token(p, s, ranked, i);
        const int32_t row = s.first_destination_row + i;
        groups.row_token[row] = token;
        if (src_map) src_map[token] = row;
    }
}

// The most keys that rank_by_score or group_tokens sorts.
EDGECOMP_HD int32_t largest_keys(const edgecomp_topk_merge_params& p, const Layout& s) {
    return power_of_two_from(p.partition == EDGECOMP_ALTERNATE ? s.sources : s.candidates);
}

}  // namespace edgecomp
#endif
