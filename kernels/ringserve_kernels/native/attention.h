// What the caller hands over, shared by the kernel and ringserve_kernels/native/library.py, which mirrors it.
//
// Layout of keys and values: per head, blocks one after the other, `block` tokens each. Within a block
//   keys    [key_dim / pack][block][pack]        values  [block / pack][value_dim][pack]
// with pack = 1 for fp32 queries and 2 for bf16: the operands that the products read, as they read them.
#pragma once

#include <cstdint>

extern "C" {

enum RingserveFormat : int64_t { RINGSERVE_F32 = 0, RINGSERVE_BF16 = 1, RINGSERVE_INT8 = 2, RINGSERVE_FP8 = 3 };

struct RingserveAttention {
    const void* q;                              // fp32 or bf16 [rows, heads, key_dim], the last adjacent
    int64_t q_format, q_row_stride, q_head_stride;
    const void *k, *v;
    int64_t kv_format, k_head_stride, v_head_stride;   // in elements
    const float *k_scale, *v_scale;             // [kv_heads, tokens], for INT8 and FP8
    int64_t scale_head_stride;
    float* o;                                   // accumulators: [rows, heads, value_dim] and [rows, heads], natural log
    int64_t o_row_stride, o_head_stride;
    float* lse;
    int64_t lse_row_stride, lse_head_stride;
    int64_t heads, kv_heads, key_dim, value_dim;
    int64_t block;                              // tokens: a multiple of 16 up to 256
    int64_t sequences;
    const int64_t* row_start;                   // [sequences] first row in q
    const int64_t* row_count;                   // [sequences]
    const int64_t* index_start;                 // [sequences] where its rows' token indices begin in row_index
    const int64_t* row_index;                   // ascending within a sequence
    const int64_t* block_start;                 // [sequences + 1] in the arrays below
    const int64_t* first;                       // token index of each block's first key, ascending within a sequence
    const int64_t* length;                      // keys in the block, 1 to `block`
    const int64_t* place;                       // number of the block in the storage
    int64_t window;                             // 0: none
    double scale, softcap;                      // softcap 0: none
    int64_t threads;
};

struct RingserveStore {
    const void* source;                         // [heads, tokens, dim], the last adjacent
    void* target;
    const int64_t* where;                       // [tokens] token offset in the storage
    int64_t element_size, pack, heads, tokens, dim, block, target_tokens, source_head_stride, source_token_stride,
        target_head_stride, is_value, threads;
};

const char* ringserve_variant();
int ringserve_prepare();                        // 0, or why this process may not use the variant
void ringserve_attend(const RingserveAttention* call);
int64_t ringserve_store(const RingserveStore* call);  // -1, or which token's `where` is not in the storage
int64_t ringserve_threads();                    // of the pool it would use: torch's own, if all is well
}
