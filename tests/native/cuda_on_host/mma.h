// Tensor cores: lane 0 of a warp does the work of all; products exact, sums in float.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    float values[16][16];
};

inline float widen(__half value) { return __half2float(value); }
inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
inline bool is_first() { return threadIdx.x % 32 == 0; }

template <typename Fragment>
void fill_fragment(Fragment& f, float value) {
    for (auto& row : f.values) std::fill(std::begin(row), std::end(row), value);
}

template <typename T>
void load_matrix_sync(fragment<matrix_a, 16, 16, 16, T, row_major>& f, const T* from, unsigned stride) {
    if (!is_first()) return;
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) f.values[i][k] = widen(from[i * stride + k]);
    }
}

template <typename T>
void load_matrix_sync(fragment<matrix_b, 16, 16, 16, T, col_major>& f, const T* from, unsigned stride) {
    if (!is_first()) return;
    for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 16; ++j) f.values[k][j] = widen(from[j * stride + k]);
    }
}

template <typename A, typename B, typename C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
    if (!is_first()) return;
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) {
            float sum = c.values[i][j];
            for (int k = 0; k < 16; ++k) sum += a.values[i][k] * b.values[k][j];
            d.values[i][j] = sum;
        }
    }
}

template <typename C>
void store_matrix_sync(float* to, const C& c, unsigned stride, layout_t) {
    if (!is_first()) return;
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) to[i * stride + j] = c.values[i][j];
    }
}

}  // namespace wmma
}  // namespace nvcuda
