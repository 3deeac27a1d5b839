// index.h behind a C function, for the tests: one sample, matched by given similarities.
#include <vector>

#include "index.h"

extern "C" void index_on_host(const edgecomp_topk_merge_params* params, const float* similarity, const float* scores,
                              int32_t* row_token, int32_t* begin, int32_t* merged, int32_t* src_map) {
    using namespace edgecomp;
    const auto& p = *params;
    const Layout s = make_layout(p);
    const auto barrier = [] {};
    std::vector<uint64_t> keys(largest_keys(p, s), 0);
    std::vector<int32_t> ranked(p.tokens);
    if (p.partition == EDGECOMP_BY_SCORE) rank_by_score(p, s, scores, keys.data(), ranked.data(), 0, 1, barrier);
    constexpr int kSplits = 3;
    std::vector<uint64_t> matches(kSplits * s.sources, kLast);
    for (int i = 0; i < s.sources; ++i) {
        const int32_t source = source_token(p, s, ranked.data(), i);
        for (int j = 0; j < s.destinations; ++j) {
            const int32_t destination = destination_token(p, s, ranked.data(), j);
            const uint64_t key = descending_key(similarity[source * p.tokens + destination], j);
            uint64_t& best = matches[j % kSplits * s.sources + i];
            best = key < best ? key : best;
        }
    }
    group_tokens(p, s, matches.data(), kSplits, ranked.data(), keys.data(), Groups{row_token, begin, merged}, src_map, 0,
                 1, barrier);
}
