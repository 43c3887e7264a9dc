// Vectors of fp32 for the instruction set this file is compiled for, and the three formats of a product.
//
// A product is C[r][n] += A[r][k] * B[k][n] with n in the lanes of a vector. A format says how A and B lie in memory
// and how many k one step takes:
//
//   Single     A fp32, B fp32                      one k a step     fp32 models
//   PairBf16   A bf16 pairs, B bf16 pairs          two k a step     bf16 models, CPUs that multiply bf16 (vdpbf16ps)
//   PairWiden  A fp32 pairs, B bf16 pairs          two k a step     bf16 models elsewhere: B is widened in registers
//
// "Pairs" of B: the values of k and k + 1 lie next to each other, for each n.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ringserve {

using bf16 = uint16_t;

inline float widen(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

#if defined(__AVX512F__)

struct Vec {
    static constexpr int lanes = 16;
    __m512 x;

    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec all(float value) { return {_mm512_set1_ps(value)}; }
    void store(float* p) const { _mm512_storeu_ps(p, x); }
#if defined(__AVX512BF16__)
    void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif
    float top() const { return _mm512_reduce_max_ps(x); }
    float sum() const { return _mm512_reduce_add_ps(x); }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }

// x = whole + fraction with fraction in [0, 1); times_power(y, x) is y * 2^whole, 0 for x = -inf. NaN stays NaN: a
// score that is not a number must be seen in the result.
inline Vec fraction(Vec x) { return {_mm512_reduce_ps(x.x, 1)}; }
inline Vec times_power(Vec y, Vec x) { return {_mm512_scalef_ps(y.x, x.x)}; }

using Words = __m512i;
inline Words load_words(const void* p) { return _mm512_loadu_si512(p); }
inline Vec low_half(Words w) { return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))}; }
inline Vec high_half(Words w) {
    return {_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000u))))};
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Vec {
    static constexpr int lanes = 8;
    __m256 x;

    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec all(float value) { return {_mm256_set1_ps(value)}; }
    void store(float* p) const { _mm256_storeu_ps(p, x); }
    float top() const {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    float sum() const {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }  // b where either is NaN
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.x, b.x)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }

inline Vec fraction(Vec x) {
    x = max(Vec::all(-200.0f), x);  // -inf minus its floor would be NaN
    return {_mm256_sub_ps(x.x, _mm256_floor_ps(x.x))};
}
inline Vec times_power(Vec y, Vec x) {
    __m256 whole = _mm256_floor_ps(max(Vec::all(-200.0f), min(Vec::all(127.0f), x)).x);
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    __m256 normal = _mm256_cmp_ps(whole, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);  // below: 0. NaN counts as normal
    return {_mm256_and_ps(_mm256_mul_ps(y.x, _mm256_castsi256_ps(exponent)), normal)};
}

using Words = __m256i;
inline Words load_words(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Vec low_half(Words w) { return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16))}; }
inline Vec high_half(Words w) {
    return {_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(int(0xffff0000u))))};
}

#else
#error "this kernel needs AVX2 and FMA, or AVX-512"
#endif

// 2^x for x < 128. Minimax polynomials in relative error for 2^f on [0, 1) (Remez): degree 4 is good to 2.6e-6, more
// than a weight rounded to bf16 can hold, degree 5 to 7.5e-8.
template <bool Exact>
inline Vec exp2(Vec x) {
    Vec f = fraction(x);
    Vec y;
    if constexpr (Exact) {
        y = fma(Vec::all(0.00187757668f), f, Vec::all(0.00898934009f));
        y = fma(y, f, Vec::all(0.0558263181f));
        y = fma(y, f, Vec::all(0.240153617f));
        y = fma(y, f, Vec::all(0.693153073f));
        y = fma(y, f, Vec::all(0.999999925f));
    } else {
        y = fma(Vec::all(0.0135341679f), f, Vec::all(0.0520114606f));
        y = fma(y, f, Vec::all(0.241442757f));
        y = fma(y, f, Vec::all(0.693003834f));
        y = fma(y, f, Vec::all(1.00000259f));
    }
    return times_power(y, x);
}

// tanh(x) to 1e-7, by e^2x.
inline Vec tanh(Vec x) {
    const Vec most = Vec::all(15.0f), one = Vec::all(1.0f), two = Vec::all(2.0f);
    x = max(Vec::all(-15.0f), min(most, x));
    return one - two / (one + exp2<true>(x * Vec::all(2.8853900817779268f)));
}

// Weights of the values are stored as A of their product.
struct ExactWeights {
    static constexpr bool exact_weights = true;
    static Vec store_weights(Vec low, Vec high, float* p, Vec sum) {
        low.store(p);
        high.store(p + Vec::lanes);
        return sum;
    }
    static Vec store_weights(Vec low, float* p, Vec sum) {
        low.store(p);
        return sum;
    }
};

struct Single : ExactWeights {
    static constexpr int pack = 1;  // k of a step
    static constexpr bool exact = true;
    using A = float;
    using B = float;
    using Weight = float;
    struct BVec { Vec b; };
    struct AVec { Vec a; };
    static BVec load_b(const B* p) { return {Vec::load(p)}; }
    static AVec load_a(const A* p) { return {Vec::all(*p)}; }
    static Vec multiply(Vec c, AVec a, BVec b) { return fma(a.a, b.b, c); }
    static A from(float x) { return x; }
    static A from(bf16 x) { return widen(x); }
};

struct PairWiden : ExactWeights {
    static constexpr int pack = 2;
    static constexpr bool exact = false;
    using A = float;
    using B = bf16;
    struct BVec { Vec low, high; };
    struct AVec { Vec low, high; };
    static BVec load_b(const B* p) {
        Words words = load_words(p);
        return {low_half(words), high_half(words)};
    }
    static AVec load_a(const A* p) { return {Vec::all(p[0]), Vec::all(p[1])}; }
    static Vec multiply(Vec c, AVec a, BVec b) { return fma(a.high, b.high, fma(a.low, b.low, c)); }
    static A from(bf16 x) { return widen(x); }
};

#if defined(__AVX512BF16__)
struct PairBf16 {
    static constexpr int pack = 2;
    static constexpr bool exact = false;
    using A = bf16;
    using B = bf16;
    struct BVec { __m512bh b; };
    struct AVec { __m512bh a; };
    static BVec load_b(const B* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
    static AVec load_a(const A* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return {(__m512bh)_mm512_set1_epi32(pair)};
    }
    static Vec multiply(Vec c, AVec a, BVec b) { return {_mm512_dpbf16_ps(c.x, a.a, b.b)}; }
    static A from(bf16 x) { return x; }
    // Rounded to bf16; the sum is of the rounded ones. Divided by it, equal values give that value.
    static constexpr bool exact_weights = false;
    static Vec store_weights(Vec low, Vec high, bf16* p, Vec sum) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(high.x, low.x);
        _mm512_storeu_si512(p, (__m512i)pair);
        return {_mm512_dpbf16_ps(sum.x, pair, (__m512bh)_mm512_set1_epi16(0x3f80))};
    }
    static Vec store_weights(Vec low, bf16* p, Vec sum) {
        const __m256bh one = _mm512_cvtneps_pbh(low.x);
        _mm256_storeu_si256((__m256i*)p, (__m256i)one);
        return {_mm512_dpbf16_ps(sum.x, (__m512bh)_mm512_zextsi256_si512((__m256i)one),
                                 (__m512bh)_mm512_set1_epi16(0x3f80))};
    }
};
using Pair = PairBf16;
#else
using Pair = PairWiden;
#endif

}  // namespace ringserve
