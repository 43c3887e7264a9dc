// The same product in AMX tiles: 16 x 16 fp32 of C, 16 rows x 32 bf16 of A, 16 pairs x 16 of B.
//
// With RINGSERVE_EMULATED_TILES the tile instructions are functions in plain C++, so that the layouts and loops here
// are tested on any machine.
#pragma once

#include "simd.h"

#if defined(RINGSERVE_TILES) && !defined(RINGSERVE_EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ringserve {
#if defined(RINGSERVE_TILES)

#if defined(RINGSERVE_EMULATED_TILES)

inline thread_local float tile_c[4][16][16];
inline thread_local bf16 tile_ab[8][16][32];

#define TILE_ZERO(c) std::memset(tile_c[c], 0, sizeof tile_c[c])
#define TILE_LOAD_C(c, from, stride) \
    for (int r = 0; r < 16; ++r) std::memcpy(tile_c[c][r], (const char*)(from) + r * (stride), 64)
#define TILE_STORE_C(c, to, stride) \
    for (int r = 0; r < 16; ++r) std::memcpy((char*)(to) + r * (stride), tile_c[c][r], 64)
#define TILE_LOAD(t, from, stride) \
    for (int r = 0; r < 16; ++r) std::memcpy(tile_ab[t][r], (const char*)(from) + r * (stride), 64)
#define TILE_MULTIPLY(c, a, b)                                                                \
    for (int r = 0; r < 16; ++r)                                                              \
        for (int n = 0; n < 16; ++n)                                                          \
            for (int k = 0; k < 32; ++k)                                                      \
                tile_c[c][r][n] += widen(tile_ab[a][r][k]) * widen(tile_ab[b][k / 2][2 * n + k % 2])

inline int tiles_prepare() { return 0; }
inline void tiles_begin() {}
inline void tiles_end() {}

#else

#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD_C(c, from, stride) _tile_loadd(c, from, stride)
#define TILE_STORE_C(c, to, stride) _tile_stored(c, to, stride)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

// Linux gives a process the tiles' state only when it asks (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
inline int tiles_prepare() { return int(syscall(SYS_arch_prctl, 0x1023, 18)); }

inline void tiles_begin() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
}
inline void tiles_end() { _tile_release(); }

#endif

// The compiler does not know that tile loads read memory: what was written before must be there.
inline void memory_is_written() { __asm__ volatile("" ::: "memory"); }

// C tiles 0 to 3; A tiles 4 and 5, B tiles 6 and 7.
template <int ROWS, int COLUMNS>
inline void tile_block(const bf16* a, int64_t lda, const bf16* const* b, int64_t b_offset, int blocks, int steps,
                       int64_t ldb, float* c, int64_t ldc, bool add) {
    const int64_t a_stride = lda * 2, b_stride = ldb * 2, c_stride = ldc * 4;
    memory_is_written();
    if (add) {
        TILE_LOAD_C(0, c, c_stride);
        if (COLUMNS > 1) { TILE_LOAD_C(1, c + 16, c_stride); }
        if (ROWS > 1) { TILE_LOAD_C(2, c + 16 * ldc, c_stride); }
        if (ROWS > 1 && COLUMNS > 1) { TILE_LOAD_C(3, c + 16 * ldc + 16, c_stride); }
    } else {
        TILE_ZERO(0);
        if (COLUMNS > 1) { TILE_ZERO(1); }
        if (ROWS > 1) { TILE_ZERO(2); }
        if (ROWS > 1 && COLUMNS > 1) { TILE_ZERO(3); }
    }
    for (int block = 0; block < blocks; ++block) {
        const bf16* from = b[block] + b_offset;
        for (int k = 0; k < steps; ++k) {
            TILE_LOAD(4, a, a_stride);
            TILE_LOAD(6, from, b_stride);
            TILE_MULTIPLY(0, 4, 6);
            if (COLUMNS > 1) { TILE_LOAD(7, from + 32, b_stride); TILE_MULTIPLY(1, 4, 7); }
            if (ROWS > 1) { TILE_LOAD(5, a + 16 * lda, a_stride); TILE_MULTIPLY(2, 5, 6); }
            if (ROWS > 1 && COLUMNS > 1) { TILE_MULTIPLY(3, 5, 7); }
            a += 32;
            from += 16 * ldb;
        }
    }
    TILE_STORE_C(0, c, c_stride);
    if (COLUMNS > 1) { TILE_STORE_C(1, c + 16, c_stride); }
    if (ROWS > 1) { TILE_STORE_C(2, c + 16 * ldc, c_stride); }
    if (ROWS > 1 && COLUMNS > 1) { TILE_STORE_C(3, c + 16 * ldc + 16, c_stride); }
    memory_is_written();
}

// `steps` of 32 k each; ROWS tiles of 16 rows; `columns` a multiple of 16.
template <int ROWS>
inline void tiles_product(const bf16* a, int64_t lda, const bf16* const* b, int blocks, int steps, int64_t ldb,
                          int columns, float* c, int64_t ldc, bool add) {
    int n = 0;
    for (; n + 32 <= columns; n += 32) tile_block<ROWS, 2>(a, lda, b, 2 * n, blocks, steps, ldb, c + n, ldc, add);
    if (n < columns) tile_block<ROWS, 1>(a, lda, b, 2 * n, blocks, steps, ldb, c + n, ldc, add);
}

#endif
}  // namespace ringserve
