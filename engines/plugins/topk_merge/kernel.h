/* The kernel's C interface: no TensorRT, no C++; for ctypes, for the plugin and for C++ products. */
#ifndef EDGECOMP_TOPK_MERGE_KERNEL_H
#define EDGECOMP_TOPK_MERGE_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define EDGECOMP_API __declspec(dllexport)
#else
#define EDGECOMP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGECOMP_WAVG, EDGECOMP_MEAN, EDGECOMP_SUM, EDGECOMP_PRUNE, EDGECOMP_TOFU };
enum { EDGECOMP_ALTERNATE, EDGECOMP_BY_SCORE };
enum { EDGECOMP_ASCENDING, EDGECOMP_RANK };
enum { EDGECOMP_FLOAT32, EDGECOMP_FLOAT16, EDGECOMP_BFLOAT16 };

/* Limits; README.md and plugin.toml state the same. */
enum { EDGECOMP_LARGEST_BATCH = 1024, EDGECOMP_LARGEST_TOKENS = 4096, EDGECOMP_LARGEST_WIDTH = 4096 };

/* Sizes and attributes of one call; README.md defines them. */
typedef struct edgecomp_topk_merge_params {
    int32_t batch;             /* B */
    int32_t tokens;            /* N */
    int32_t metric_width;      /* Dm */
    int32_t width;             /* D */
    int32_t r;                 /* tokens that disappear */
    int32_t num_prefix_tokens; /* P */
    int32_t mode;
    int32_t partition;
    int32_t order;
    int32_t dtype; /* of metric, x and y */
} edgecomp_topk_merge_params;

/* Bytes of device memory that a call needs; 0 where the parameters are refused. A function of the parameters alone. */
EDGECOMP_API size_t edgecomp_topk_merge_workspace(const edgecomp_topk_merge_params* params);

/* Queues the op on a CUDA stream; allocates nothing, waits for nothing, and may be captured into a graph.
 *
 * All pointers are device memory, contiguous, in the shapes of README.md. An output may be NULL when it is not wanted;
 * `x` only when `y` is, `size` only when neither `merged_size` nor a weighted `y` is wanted, `scores` only without
 * by_score. `workspace` is aligned to 256 bytes. Outputs must not overlap inputs.
 * Returns 0, or a code for edgecomp_topk_merge_error. */
EDGECOMP_API int edgecomp_topk_merge(void* stream, const edgecomp_topk_merge_params* params, const void* metric,
                                     const void* x, const float* size, const float* scores, void* y,
                                     float* merged_size, int32_t* src_map, void* workspace, size_t workspace_bytes);

/* Says in English what a code means; never NULL. */
EDGECOMP_API const char* edgecomp_topk_merge_error(int code);

/* Returns 0, or the code of the first parameter that is out of range. */
EDGECOMP_API int edgecomp_topk_merge_check(const edgecomp_topk_merge_params* params);

#ifdef __cplusplus
}
#endif
#endif
