// C[r][n] += A[r][k] * B[k][n], the product that scores and values are made of: tiles of it held in registers.
#pragma once

#include "simd.h"

namespace ringserve {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6;     // 6 x 4 accumulators, 4 vectors of B and one of A in 32 registers
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4;     // 4 x 2 accumulators, 4 of B (two halves) and 2 of A in 16 registers
constexpr int TILE_VECTORS = 2;
#endif

// A is [R][blocks * steps] in units of one step, B is `blocks` matrices [steps][ldb / pack] in pairs. With `decay`, C
// is what it was times decay[r], else it is set.
template <class F, int R, int N>
inline void tile_product(const typename F::A* a, int64_t lda, const typename F::B* const* b, int64_t b_offset,
                         int blocks, int steps, int64_t ldb, float* c, int64_t ldc, const float* decay) {
    Vec sum[R][N];
    if (decay) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            Vec factor = Vec::all(decay[r]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[r][n] = Vec::load(c + r * ldc + n * Vec::lanes) * factor;
        }
    } else {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[r][n] = Vec::all(0.0f);
    }
    for (int block = 0; block < blocks; ++block) {
        const typename F::B* from = b[block] + b_offset;
        for (int k = 0; k < steps; ++k) {
            typename F::BVec row[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) row[n] = F::load_b(from + n * Vec::lanes * F::pack);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                typename F::AVec value = F::load_a(a + r * lda);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sum[r][n] = F::multiply(sum[r][n], value, row[n]);
            }
            a += F::pack;
            from += ldb;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[r][n].store(c + r * ldc + n * Vec::lanes);
}

// The same over `columns` n, a multiple of the lanes.
template <class F, int R>
inline void product(const typename F::A* a, int64_t lda, const typename F::B* const* b, int blocks, int steps,
                    int64_t ldb, int columns, float* c, int64_t ldc, const float* decay) {
    constexpr int lanes = Vec::lanes;
    int n = 0;
    for (; n + TILE_VECTORS * lanes <= columns; n += TILE_VECTORS * lanes)
        tile_product<F, R, TILE_VECTORS>(a, lda, b, n * F::pack, blocks, steps, ldb, c + n, ldc, decay);
    if constexpr (TILE_VECTORS > 2)
        for (; n + 2 * lanes <= columns; n += 2 * lanes)
            tile_product<F, R, 2>(a, lda, b, n * F::pack, blocks, steps, ldb, c + n, ldc, decay);
    for (; n + lanes <= columns; n += lanes)
        tile_product<F, R, 1>(a, lda, b, n * F::pack, blocks, steps, ldb, c + n, ldc, decay);
}

}  // namespace ringserve
