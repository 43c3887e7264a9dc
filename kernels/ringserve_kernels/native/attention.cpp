// Attention of ragged rows over the blocks of a paged KV cache, on CPU vectors and tiles: (o, lse) merged into
// accumulators. Online softmax over chunks of keys (FlashAttention-2, Dao 2023, 2307.08691; split keys for few rows:
// Flash-Decoding, 2023), with the query heads of a kv head packed as rows, so that each key is read once.
//
// A task is one kv head, some rows of one sequence and a range of its blocks. Its rows are worked on in strips whose
// scores stay in the first cache, while a chunk of keys stays in the second:
//
//   task:   for each chunk of 256 keys            K and V of the chunk: 64 to 128 KiB
//   strip:      for each strip of rows            scores, weights: a few KiB
//                   scores = Q K^T;  mask by index;  top, decay;  weights = 2^(scores - top);  O = decay O + weights V
#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

#include "product.h"
#include "tiles.h"

namespace ringserve {
namespace {

constexpr int CHUNK = 256;          // keys, and the largest block
constexpr int MOST_BLOCKS = CHUNK / 16;
constexpr int TASK_ROWS = 512;      // packed rows whose O (fp32) and Q lie in the second cache
constexpr int PIECE = 4096;         // keys of a piece at least, where a sequence's rows are one task
constexpr int MOST_PART_ROWS = 8192;  // rows of all partials of a head: bounds their memory. Nothing else in the batch
                                      // decides about the pieces, so a sequence's result does not depend on it
constexpr int MOST_STRIP = 32;      // rows of the tallest strip
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

// Memory that grows and is kept, on cache lines.
template <class T>
struct Buffer {
    T* data = nullptr;
    size_t size = 0;
    T* room(size_t wanted) {
        if (wanted > size) {
            std::free(data);
            data = static_cast<T*>(std::aligned_alloc(64, (wanted * sizeof(T) + 63) / 64 * 64));
            if (!data) std::abort();
            size = wanted;
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};

struct Task {
    int64_t sequence, head, row_from, row_to, block_from, block_to;
    int64_t part;  // number of its partial result, -1: merged into the accumulators at once
};

// Pieces of one head's keys: partials part, part + 1, ... of the sequence's rows.
struct Split {
    int64_t sequence, head, part, parts;
};

template <class F>
struct Scratch {
    Buffer<typename F::A> q, weights;
    Buffer<typename F::B> k, v;
    Buffer<float> o, scores, k_scale, v_scale;
    Buffer<float> top, total;
    Buffer<float> divisor;  // the total of the weights as they are rounded: then equal values give that value
    Buffer<int64_t> index;
};

// A partial result: [rows, value_dim] and [rows].
struct Part {
    float *o, *lse;
};

// Merge one row's partial over other keys: m = max(l, l'), o = (e^(l-m) o + e^(l'-m) o') / sum, l = m + log(sum).
inline void merge_row(float* o, float* lse, const float* part_o, float part_lse, float part_factor, int64_t dim) {
    if (part_lse == NEVER) return;
    float m = std::max(*lse, part_lse), a = std::exp(*lse - m), b = std::exp(part_lse - m), sum = a + b;
    if (std::isnan(sum)) m = sum;  // of a row whose scores are not finite: it must be seen, not hidden
    float keep = a / sum, take = b / sum * part_factor;
    if (keep == 0.0f)
        for (int64_t d = 0; d < dim; ++d) o[d] = part_o[d] * take;
    else
        for (int64_t d = 0; d < dim; ++d) o[d] = o[d] * keep + part_o[d] * take;
    *lse = m + std::log(sum);
}

template <class F>
struct Chunk {
    int blocks = 0;
    const typename F::B *k[MOST_BLOCKS], *v[MOST_BLOCKS];
    int64_t first[MOST_BLOCKS], length[MOST_BLOCKS];
    const float *k_scale[MOST_BLOCKS], *v_scale[MOST_BLOCKS];
};

inline float from_fp8(uint8_t x) {  // e4m3 without infinities; its bits are fp16's, but for the bias
    uint32_t magnitude = x & 0x7f;
    float value = magnitude >= 8 ? std::ldexp(float(8 + (magnitude & 7)), int(magnitude >> 3) - 10)
                                 : std::ldexp(float(magnitude), -9);
    return x & 0x80 ? -value : value;
}

// A number of at most seven significant bits, exactly, as an operand of the products.
template <class B>
B operand(float value) {
    if constexpr (sizeof(B) == 2) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return B(bits >> 16);
    } else {
        return value;
    }
}

template <class B>
const B* fp8_table() {
    static const auto table = [] {
        std::vector<B> values(256);
        for (int x = 0; x < 256; ++x) values[x] = operand<B>(from_fp8(uint8_t(x)));
        return values;
    }();
    return table.data();
}

template <class B>
void unpack(const void* from, int64_t format, int64_t count, B* to) {
    if (format == RINGSERVE_FP8) {
        const B* table = fp8_table<B>();
        const uint8_t* codes = static_cast<const uint8_t*>(from);
        for (int64_t i = 0; i < count; ++i) to[i] = table[codes[i]];
    } else {
        const int8_t* numbers = static_cast<const int8_t*>(from);
        for (int64_t i = 0; i < count; ++i) to[i] = operand<B>(float(numbers[i]));
    }
}

template <class F>
class Worker {
  public:
    explicit Worker(const RingserveAttention& call) : call(call), group(call.heads / call.kv_heads) {
        quantized = call.kv_format == RINGSERVE_INT8 || call.kv_format == RINGSERVE_FP8;
        score_scale = float(call.softcap > 0 ? LOG2E : call.scale * LOG2E);
    }

    void run(const Task& task, Part part) {
        rows = (task.row_to - task.row_from) * group;
        take_rows(task);
        for (int64_t block = task.block_from; block < task.block_to;) {
            const int64_t stop = std::min(task.block_to, block + CHUNK / call.block);
            take_keys(task, block, stop);
            for (int64_t row = 0; row < padded_rows; row += strip_rows(row)) strip(row);
            block = stop;
        }
        give(task, part);
    }

  private:
    const RingserveAttention& call;
    const int64_t group;
    bool quantized;
    float score_scale;
    int64_t rows = 0, padded_rows = 0, depth = 0;
    static thread_local Scratch<F> scratch;
    Chunk<F> chunk;

#if defined(RINGSERVE_TILES)
    static constexpr bool has_tiles = F::pack == 2;
#else
    static constexpr bool has_tiles = false;
#endif
    bool tiled() const { return has_tiles && call.block % 32 == 0 && call.key_dim >= 32; }

    int64_t strip_rows(int64_t row) const {
        const int64_t left = padded_rows - row;
        return tiled() ? (left >= 32 ? 32 : 16) : std::min<int64_t>(left, TILE_ROWS);
    }

    void take_rows(const Task& task) {
        padded_rows = tiled() ? (rows + 15) / 16 * 16 : rows;
        depth = call.key_dim;
        auto* q = scratch.q.room(padded_rows * depth);
        int64_t* index = scratch.index.room(padded_rows);
        const int64_t* row_index = call.row_index + call.index_start[task.sequence];
        const int64_t start = call.row_start[task.sequence];
        int64_t row = 0;
        for (int64_t t = task.row_from; t < task.row_to; ++t)
            for (int64_t g = 0; g < group; ++g, ++row) {
                index[row] = row_index[t];
                const int64_t at = (start + t) * call.q_row_stride + (task.head * group + g) * call.q_head_stride;
                if (call.q_format == RINGSERVE_F32) {
                    if constexpr (F::pack == 1)
                        std::memcpy(q + row * depth, static_cast<const float*>(call.q) + at, depth * 4);
                } else {
                    const bf16* from = static_cast<const bf16*>(call.q) + at;
                    for (int64_t d = 0; d < depth; ++d) q[row * depth + d] = F::from(from[d]);
                }
            }
        for (; row < padded_rows; ++row) {  // rows that fill the last tile: computed and dropped
            index[row] = index[rows - 1];
            std::memset(q + row * depth, 0, depth * sizeof *q);
        }
        float* o = scratch.o.room(padded_rows * call.value_dim);
        std::memset(o, 0, padded_rows * call.value_dim * sizeof(float));
        std::fill_n(scratch.top.room(padded_rows), padded_rows, NEVER);
        std::fill_n(scratch.total.room(padded_rows), padded_rows, 0.0f);
        std::fill_n(scratch.divisor.room(padded_rows), padded_rows, 0.0f);
        scratch.scores.room(MOST_STRIP * CHUNK);
        scratch.weights.room(MOST_STRIP * CHUNK);
    }

    void take_keys(const Task& task, int64_t from, int64_t to) {
        using B = typename F::B;
        const int64_t size = call.block, k_size = size * call.key_dim, v_size = size * call.value_dim;
        chunk.blocks = int(to - from);
        B* k_room = quantized ? scratch.k.room(CHUNK * call.key_dim) : nullptr;
        B* v_room = scratch.v.room(CHUNK * call.value_dim);
        float* k_scales = quantized ? scratch.k_scale.room(CHUNK) : nullptr;
        float* v_scales = quantized ? scratch.v_scale.room(CHUNK) : nullptr;
        for (int i = 0; i < chunk.blocks; ++i) {
            const int64_t block = call.block_start[task.sequence] + from + i, place = call.place[block];
            const int64_t length = call.length[block];
            chunk.first[i] = call.first[block];
            chunk.length[i] = length;
            const int64_t k_at = task.head * call.k_head_stride + place * k_size;
            const int64_t v_at = task.head * call.v_head_stride + place * v_size;
            B* v_copy = v_room + i * v_size;
            if (quantized) {
                unpack(static_cast<const uint8_t*>(call.k) + k_at, call.kv_format, k_size, k_room + i * k_size);
                unpack(static_cast<const uint8_t*>(call.v) + v_at, call.kv_format, v_size, v_copy);
                chunk.k[i] = k_room + i * k_size;
                chunk.v[i] = v_copy;
                const int64_t scale_at = task.head * call.scale_head_stride + place * size;
                for (int64_t j = 0; j < size; ++j) {
                    k_scales[i * size + j] = j < length ? call.k_scale[scale_at + j] : 0.0f;
                    v_scales[i * size + j] = j < length ? call.v_scale[scale_at + j] : 0.0f;
                }
                chunk.k_scale[i] = k_scales + i * size;
                chunk.v_scale[i] = v_scales + i * size;
            } else {
                chunk.k[i] = static_cast<const B*>(call.k) + k_at;
                chunk.v[i] = static_cast<const B*>(call.v) + v_at;
            }
            if (length < size) {  // what lies behind the last key may be anything, also NaN, and 0 * NaN is NaN
                if (!quantized) std::memcpy(v_copy, chunk.v[i], v_size * sizeof(B));
                for (int64_t j = length; j < size; ++j)
                    for (int64_t d = 0; d < call.value_dim; ++d)
                        v_copy[(j / F::pack * call.value_dim + d) * F::pack + j % F::pack] = B(0);
                chunk.v[i] = v_copy;
            }
        }
    }

    void strip(int64_t row) {
        if (tiled()) {
#if defined(RINGSERVE_TILES)
            if constexpr (has_tiles) {
                if (padded_rows - row >= 32) strip_of<32>(row);
                else strip_of<16>(row);
            }
#endif
            return;
        }
        switch (strip_rows(row)) {
            case 1: return strip_of<1>(row);
            case 2: return strip_of<2>(row);
            case 3: return strip_of<3>(row);
            case 4: return strip_of<4>(row);
#if defined(__AVX512F__)
            case 5: return strip_of<5>(row);
            case 6: return strip_of<6>(row);
#endif
        }
    }

    // Which of a block's keys a row at this index sees: [low, high).
    void seen(int block, int64_t index, int64_t& low, int64_t& high) const {
        high = std::clamp<int64_t>(index - chunk.first[block] + 1, 0, chunk.length[block]);
        low = call.window ? std::clamp<int64_t>(index - call.window + 1 - chunk.first[block], 0, high) : 0;
    }

    template <int R>
    void strip_of(int64_t row) {
        using B = typename F::B;
        const int64_t size = call.block;
        const int64_t* index = scratch.index.data + row;
        const B *k[MOST_BLOCKS], *v[MOST_BLOCKS];
        int which[MOST_BLOCKS], blocks = 0;
        bool whole[MOST_BLOCKS];
        for (int i = 0; i < chunk.blocks; ++i) {
            int64_t low, high, last_low, last_high;
            seen(i, index[0], low, high);
            seen(i, index[R - 1], last_low, last_high);
            // Rows ascend, so the first row's low and the last row's high bound them all.
            if (last_high <= low) continue;
            which[blocks] = i;
            whole[blocks] = high == size && last_low == 0;
            k[blocks] = chunk.k[i];
            v[blocks++] = chunk.v[i];
        }
        if (!blocks) return;
        float* scores = scratch.scores.data;
        score<R>(scratch.q.data + row * depth, k, blocks, scores);
        if (quantized || call.softcap > 0)
            for (int r = 0; r < R; ++r) adjust(scores + r * CHUNK, which, blocks);
        for (int i = 0; i < blocks; ++i)
            if (!whole[i])
                for (int r = 0; r < R; ++r) {
                    int64_t low, high;
                    seen(which[i], index[r], low, high);
                    float* part = scores + r * CHUNK + i * size;
                    std::fill(part, part + low, NEVER);
                    std::fill(part + high, part + size, NEVER);
                }
        alignas(64) float decay[MOST_STRIP + Vec::lanes];
        weigh<R>(row, which, blocks, decay);
        values<R>(v, blocks, scratch.o.data + row * call.value_dim, decay);
    }

    template <int R>
    void score(const typename F::A* q, const typename F::B* const* k, int blocks, float* scores) {
        const int64_t size = call.block;
        for (int i = 0; i < blocks; ++i) {
#if defined(RINGSERVE_TILES)
            if constexpr (has_tiles && R % 16 == 0) {
                const int steps = int(depth / 32);
                tiles_product<R / 16>(q, depth, k + i, 1, steps, size * 2, int(size), scores + i * size, CHUNK, false);
                if (depth % 32) {
                    float ones[TILE_ROWS];
                    std::fill_n(ones, TILE_ROWS, 1.0f);
                    const bf16* rest = k[i] + steps * 16 * size * 2;
                    for (int r = 0; r < R; r += 4)
                        product<F, 4>(q + r * depth + steps * 32, depth, &rest, 1, int(depth % 32) / 2, size * 2,
                                      int(size), scores + r * CHUNK + i * size, CHUNK, ones);
                }
                continue;
            }
#endif
            if constexpr (R <= TILE_ROWS)
                product<F, R>(q, depth, k + i, 1, int(depth / F::pack), size * F::pack, int(size), scores + i * size,
                              CHUNK, nullptr);
        }
    }

    template <int R>
    void values(const typename F::B* const* v, int blocks, float* o, const float* decay) {
        const int64_t size = call.block, dim = call.value_dim;
        const auto* weights = scratch.weights.data;
#if defined(RINGSERVE_TILES)
        if constexpr (has_tiles && R % 16 == 0) {
            for (int r = 0; r < R; ++r) {
                Vec factor = Vec::all(decay[r]);
                for (int64_t d = 0; d < dim; d += Vec::lanes) (Vec::load(o + r * dim + d) * factor).store(o + r * dim + d);
            }
            tiles_product<R / 16>(weights, CHUNK, v, blocks, int(size / 32), dim * 2, int(dim), o, dim, true);
            return;
        }
#endif
        if constexpr (R <= TILE_ROWS)
            product<F, R>(weights, CHUNK, v, blocks, int(size / F::pack), dim * F::pack, int(dim), o, dim, decay);
    }

    // Scores times the keys' scales, then capped: softcap * tanh(scale * s / softcap).
    void adjust(float* scores, const int* which, int blocks) {
        const Vec factor = Vec::all(float(call.scale / call.softcap)), cap = Vec::all(float(call.softcap));
        for (int i = 0; i < blocks; ++i)
            for (int64_t j = 0; j < call.block; j += Vec::lanes) {
                float* at = scores + i * call.block + j;
                Vec s = Vec::load(at);
                if (quantized) s = s * Vec::load(chunk.k_scale[which[i]] + j);
                if (call.softcap > 0) s = cap * tanh(s * factor);
                s.store(at);
            }
    }

    // Weights of R rows: top and total go on from chunk to chunk, `decay` is what the past is worth now.
    template <int R>
    void weigh(int64_t row, const int* which, int blocks, float* decay) {
        const int64_t keys = blocks * call.block;
        const Vec scale = Vec::all(score_scale);
        float* top = scratch.top.data + row;
        float shift[R];
        for (int r = 0; r < R; ++r) {
            const float* scores = scratch.scores.data + r * CHUNK;
            Vec best = Vec::load(scores);
            for (int64_t j = Vec::lanes; j < keys; j += Vec::lanes) best = max(best, Vec::load(scores + j));
            const float now = std::max(top[r], best.top() * score_scale);
            shift[r] = now == NEVER ? 0.0f : -now;
            decay[r] = top[r] + shift[r];
            top[r] = now;
        }
        for (int r = 0; r < R; r += Vec::lanes) exp2<true>(Vec::load(decay + r)).store(decay + r);
        for (int r = 0; r < R; ++r) {
            const float* scores = scratch.scores.data + r * CHUNK;
            auto* weights = scratch.weights.data + r * CHUNK;
            const Vec by = Vec::all(shift[r]);
            Vec sum = Vec::all(0.0f), rounded = Vec::all(0.0f);
            if (quantized) {
                for (int i = 0; i < blocks; ++i)
                    for (int64_t j = 0; j < call.block; j += Vec::lanes) {
                        Vec weight = exp2<F::exact>(fma(Vec::load(scores + i * call.block + j), scale, by));
                        sum = sum + weight;
                        (weight * Vec::load(chunk.v_scale[which[i]] + j)).store(weights + i * call.block + j);
                    }
            } else {
                int64_t j = 0;
                for (; j + 2 * Vec::lanes <= keys; j += 2 * Vec::lanes) {
                    Vec low = exp2<F::exact>(fma(Vec::load(scores + j), scale, by));
                    Vec high = exp2<F::exact>(fma(Vec::load(scores + j + Vec::lanes), scale, by));
                    sum = sum + low + high;
                    rounded = F::store_weights(low, high, weights + j, rounded);
                }
                if (j < keys) {
                    Vec last = exp2<F::exact>(fma(Vec::load(scores + j), scale, by));
                    sum = sum + last;
                    rounded = F::store_weights(last, weights + j, rounded);
                }
            }
            float &total = scratch.total.data[row + r], &divisor = scratch.divisor.data[row + r];
            const float more = sum.sum();
            total = total * decay[r] + more;
            divisor = divisor * decay[r] + (F::exact_weights || quantized ? more : rounded.sum());
        }
    }

    void give(const Task& task, Part part) {
        const int64_t dim = call.value_dim;
        for (int64_t row = 0; row < rows; ++row) {
            const float total = scratch.total.data[row];
            const float lse = total == 0.0f ? NEVER : float((scratch.top.data[row] + std::log2(total)) * LN2);
            const float* o = scratch.o.data + row * dim;
            if (task.part >= 0) {
                float* to = part.o + row * dim;
                const float factor = 1.0f / scratch.divisor.data[row];
                for (int64_t d = 0; d < dim; ++d) to[d] = total == 0.0f ? 0.0f : o[d] * factor;
                part.lse[row] = lse;
                continue;
            }
            const int64_t t = call.row_start[task.sequence] + task.row_from + row / group;
            const int64_t h = task.head * group + row % group;
            merge_row(call.o + t * call.o_row_stride + h * call.o_head_stride,
                      call.lse + t * call.lse_row_stride + h * call.lse_head_stride, o, lse,
                      1.0f / scratch.divisor.data[row], dim);
        }
    }
};

template <class F>
thread_local Scratch<F> Worker<F>::scratch;

// The blocks of which some row in [row_from, row_to) sees a key.
void reach(const RingserveAttention& call, int64_t sequence, int64_t row_from, int64_t row_to, int64_t& from,
           int64_t& to) {
    const int64_t *first = call.first + call.block_start[sequence], *length = call.length + call.block_start[sequence];
    const int64_t count = call.block_start[sequence + 1] - call.block_start[sequence];
    const int64_t* index = call.row_index + call.index_start[sequence];
    to = std::upper_bound(first, first + count, index[row_to - 1]) - first;
    from = 0;
    if (call.window) {
        const int64_t edge = index[row_from] - call.window;  // keys at or before it are out of every window
        from = std::upper_bound(first, first + to, edge) - first;
        if (from && first[from - 1] + length[from - 1] - 1 > edge) --from;
    }
}

template <class F>
void attend(const RingserveAttention& call) {
    const int64_t group = call.heads / call.kv_heads;
    const int64_t most = std::max<int64_t>(1, TASK_ROWS / group);
    std::vector<Task> tasks;
    std::vector<Split> splits;
    std::vector<int64_t> part_at;  // of each partial: its rows before it
    int64_t part_rows = 0;
    for (int64_t s = 0; s < call.sequences; ++s) {
        const int64_t count = call.row_count[s];
        if (!count || call.block_start[s] == call.block_start[s + 1]) continue;
        for (int64_t head = 0; head < call.kv_heads; ++head) {
            if (count <= most) {
                int64_t from, to;
                reach(call, s, 0, count, from, to);
                const int64_t most_parts = std::max<int64_t>(1, MOST_PART_ROWS / (count * group));
                const int64_t piece =
                    std::max<int64_t>({1, PIECE / call.block, (to - from + most_parts - 1) / most_parts});
                const int64_t parts = (to - from + piece - 1) / piece;
                if (parts > 1) splits.push_back({s, head, int64_t(part_at.size()), parts});
                for (int64_t i = 0; i < parts; ++i) {
                    tasks.push_back({s, head, 0, count, from + i * piece, std::min(to, from + (i + 1) * piece),
                                     parts > 1 ? int64_t(part_at.size()) : -1});
                    if (parts > 1) part_at.push_back(part_rows), part_rows += count * group;
                }
                continue;
            }
            const int64_t shares = (count + most - 1) / most, step = (count + shares - 1) / shares;  // of one size
            for (int64_t row = (count - 1) / step * step; row >= 0; row -= step) {  // the longest first
                int64_t from, to;
                const int64_t row_to = std::min(count, row + step);
                reach(call, s, row, row_to, from, to);
                if (from < to) tasks.push_back({s, head, row, row_to, from, to, -1});
            }
        }
    }
    static thread_local Buffer<float> part_o, part_lse;
    float* parts_o = part_o.room(part_rows * call.value_dim);
    float* parts_lse = part_lse.room(part_rows);
    const auto part_of = [&](int64_t part) {
        return part < 0 ? Part{} : Part{parts_o + part_at[part] * call.value_dim, parts_lse + part_at[part]};
    };
    const int64_t count = tasks.size();
#pragma omp parallel num_threads(int(call.threads)) if (call.threads > 1 && count > 1)
    {
#if defined(RINGSERVE_TILES)
        tiles_begin();
#endif
        Worker<F> worker(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; ++i) worker.run(tasks[i], part_of(tasks[i].part));
#if defined(RINGSERVE_TILES)
        tiles_end();
#endif
    }
    for (const Split& split : splits)
        for (int64_t row = 0; row < call.row_count[split.sequence] * group; ++row) {
            const int64_t t = call.row_start[split.sequence] + row / group;
            const int64_t h = split.head * group + row % group;
            for (int64_t part = split.part; part < split.part + split.parts; ++part) {
                const Part from = part_of(part);
                merge_row(call.o + t * call.o_row_stride + h * call.o_head_stride,
                          call.lse + t * call.lse_row_stride + h * call.lse_head_stride,
                          from.o + row * call.value_dim, from.lse[row], 1.0f, call.value_dim);
            }
        }
}

template <class T>
void store(const RingserveStore& call) {
    const int64_t size = call.block, pack = call.pack, dim = call.dim;
#pragma omp parallel for schedule(static) num_threads(int(call.threads)) if (call.threads > 1 && call.tokens >= 64)
    for (int64_t head = 0; head < call.heads; ++head)
        for (int64_t t = 0; t < call.tokens; ++t) {
            const T* from = static_cast<const T*>(call.source) + head * call.source_head_stride +
                            t * call.source_token_stride;
            const int64_t j = call.where[t] % size;
            T* to = static_cast<T*>(call.target) + head * call.target_head_stride + call.where[t] / size * size * dim;
            if (call.is_value) {
                to += j / pack * dim * pack + j % pack;
                for (int64_t d = 0; d < dim; ++d) to[d * pack] = from[d];
            } else if (pack == 1) {
                to += j;
                for (int64_t d = 0; d < dim; ++d) to[d * size] = from[d];
            } else {
                to += j * 2;
                for (int64_t d = 0; d < dim; d += 2) to[d * size] = from[d], to[d * size + 1] = from[d + 1];
            }
        }
}

}  // namespace
}  // namespace ringserve

extern "C" {

const char* ringserve_variant() { return RINGSERVE_VARIANT; }

int ringserve_prepare() {
#if defined(RINGSERVE_TILES)
    return ringserve::tiles_prepare();
#else
    return 0;
#endif
}

void ringserve_attend(const RingserveAttention* call) {
    if (call->q_format == RINGSERVE_F32)
        ringserve::attend<ringserve::Single>(*call);
    else
        ringserve::attend<ringserve::Pair>(*call);
}

int64_t ringserve_store(const RingserveStore* call) {
    for (int64_t t = 0; t < call->tokens; ++t)
        if (call->where[t] < 0 || call->where[t] >= call->target_tokens) return t;
    switch (call->element_size) {
        case 1: ringserve::store<uint8_t>(*call); break;
        case 2: ringserve::store<uint16_t>(*call); break;
        case 4: ringserve::store<uint32_t>(*call); break;
    }
    return -1;
}

int64_t ringserve_threads() { return omp_get_max_threads(); }
}
