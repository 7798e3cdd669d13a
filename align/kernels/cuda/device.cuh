/* What every kernel shares on a GPU. The same sources run on a CPU under tests/kernels/simulator, which defines SIMULATED
 * and its own threads, barriers, shuffles, shared memory and checked pointers.
 *
 * A kernel works on one row per block. PTR(type) is a pointer, SHARED(type, name, n) an array in shared memory.
 */
#ifndef ALIGN_DEVICE_CUH
#define ALIGN_DEVICE_CUH

#ifndef SIMULATED
#ifdef __CUDACC_RTC__ /* no system headers there */
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#else
#include <stdint.h>
#endif
#define PTR(type) type *__restrict__
#define SHARED(type, name, n) __shared__ type name[n]
#define NARROWED(T, row, v) (((T *)(row))[v]) /* element v of a row of T that begins where a row of float32 does */
__device__ __forceinline__ float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
__device__ __forceinline__ uint16_t float_to_half(float f) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
template <class T> __device__ __forceinline__ bool is_aligned16(const T *p) { return ((uint64_t)p & 15) == 0; }
template <class T> __device__ __forceinline__ uint4 load16(const T *p) { return *(const uint4 *)p; }
#endif

#define THREADS 256
#define WARPS (THREADS / 32)
#define LOG2E 1.4426950408889634
#define LN2 0.6931471805599453

struct f32 { float v; };
struct bf16 { uint16_t v; };
struct f16 { uint16_t v; };

__device__ __forceinline__ float widen(f32 x) { return x.v; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float((uint32_t)x.v << 16); }
__device__ __forceinline__ float widen(f16 x) { return half_to_float(x.v); }
__device__ __forceinline__ void narrow(float y, f32 &x) { x.v = y; }
__device__ __forceinline__ void narrow(float y, f16 &x) { x.v = float_to_half(y); }
__device__ __forceinline__ void narrow(float y, bf16 &x) {
    uint32_t bits = __float_as_uint(y);
    x.v = y != y ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* The elements of 16 loaded bytes. */
template <class T> __device__ __forceinline__ float element(const uint4 &raw, int j);
__device__ __forceinline__ uint32_t word_of(const uint4 &raw, int w) {
    return w == 0 ? raw.x : w == 1 ? raw.y : w == 2 ? raw.z : raw.w;
}
template <> __device__ __forceinline__ float element<f32>(const uint4 &raw, int j) {
    return __uint_as_float(word_of(raw, j));
}
template <> __device__ __forceinline__ float element<bf16>(const uint4 &raw, int j) {
    uint32_t word = word_of(raw, j >> 1);
    return __uint_as_float(j & 1 ? word & 0xffff0000u : word << 16);
}
template <> __device__ __forceinline__ float element<f16>(const uint4 &raw, int j) {
    return half_to_float((uint16_t)(word_of(raw, j >> 1) >> (j & 1 ? 16 : 0)));
}

/* Call f(value, index) for every element of a row, 16 bytes at a time, unaligned ends one by one. */
template <class T, class P, class Visit> __device__ __forceinline__ void for_each(P x, int64_t cols, Visit f) {
    const int E = 16 / sizeof(T);
    int64_t head = 0;
    while (head < cols && !is_aligned16(x + head)) head++; /* at most E - 1 steps */
    int64_t tail = head + (cols - head) / E * E;
    if (threadIdx.x < head + cols - tail) { /* fewer than 2 E */
        int64_t j = threadIdx.x < head ? threadIdx.x : tail + threadIdx.x - head;
        f(widen(x[j]), j);
    }
    for (int64_t j = head + (int64_t)threadIdx.x * E; j < tail; j += (int64_t)THREADS * E) {
        uint4 raw = load16(x + j);
#pragma unroll
        for (int e = 0; e < E; e++) f(element<T>(raw, e), j + e);
    }
}

/* Sums over a row relative to a running maximum m: e = 2^(k (v - m)). The difference comes first, for it is exact where e
 * matters, however far from zero the row lies. */
struct Sums {
    float m, sum, weighted, squared; /* sum of e, of e k (v - m), of e e */
};
__device__ __forceinline__ Sums no_sums() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

/* Move sums to a maximum at least as large. */
__device__ __forceinline__ void rebase(Sums &s, float m, float k) {
    if (s.m == -INFINITY || m == -INFINITY) {
        if (s.sum == 0.0f) s.m = m;
        return;
    }
    float shift = (s.m - m) * k, factor = exp2f(shift);
    s.weighted = factor > 0.0f ? (s.weighted + shift * s.sum) * factor : 0.0f;
    s.sum *= factor;
    s.squared *= factor * factor;
    s.m = m;
}

/* Add E elements; the maximum moves once for all of them. */
template <bool MOMENTS, int E> __device__ __forceinline__ void add(Sums &s, const float (&v)[E], float k) {
    float m = v[0];
#pragma unroll
    for (int j = 1; j < E; j++) m = fmaxf(m, v[j]);
    if (m > s.m) rebase(s, m, k);
    float origin = s.m == -INFINITY ? 0.0f : s.m;
#pragma unroll
    for (int j = 0; j < E; j++) {
        float d = (v[j] - origin) * k, e = exp2f(d);
        s.sum += e;
        if (MOMENTS) {
            s.weighted += e * fmaxf(d, -1e4f);
            s.squared += e * e;
        }
    }
}

__device__ __forceinline__ Sums merge(Sums a, Sums b, float k) {
    float m = fmaxf(a.m, b.m);
    rebase(a, m, k);
    rebase(b, m, k);
    return {m, a.sum + b.sum, a.weighted + b.weighted, a.squared + b.squared};
}

__device__ __forceinline__ Sums exchange(Sums s, int mask) {
    return {__shfl_xor_sync(0xffffffffu, s.m, mask), __shfl_xor_sync(0xffffffffu, s.sum, mask),
            __shfl_xor_sync(0xffffffffu, s.weighted, mask), __shfl_xor_sync(0xffffffffu, s.squared, mask)};
}

/* The block's sums, the same in every thread. */
__device__ __forceinline__ Sums merge_block(Sums s, float k) {
    SHARED(Sums, parts, WARPS);
    for (int mask = 16; mask > 0; mask >>= 1) s = merge(s, exchange(s, mask), k);
    __syncthreads(); /* parts may still be read from the call before */
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
    __syncthreads();
    s = parts[0];
    for (int w = 1; w < WARPS; w++) s = merge(s, parts[w], k);
    return s;
}

/* Where 16-byte loads of a row begin: at 0 or before it. */
template <class T, class P> __device__ __forceinline__ int64_t aligned_start(P x, int64_t cols) {
    const int E = 16 / sizeof(T);
    int64_t first = 0;
    while (first < E && first < cols && !is_aligned16(x + first)) first++;
    return first > 0 ? first - E : 0;
}

/* The E elements from i, where a 16-byte load is aligned; -inf outside the row. */
template <class T, class P, int E>
__device__ __forceinline__ void load_padded(P x, int64_t cols, int64_t i, float (&v)[E]) {
    if (i >= 0 && i + E <= cols) {
        uint4 raw = load16(x + i);
#pragma unroll
        for (int e = 0; e < E; e++) v[e] = element<T>(raw, e);
    } else {
#pragma unroll
        for (int e = 0; e < E; e++) v[e] = i + e >= 0 && i + e < cols ? widen(x[i + e]) : -INFINITY;
    }
}

/* Sums over a row, the same in every thread; m is the row's maximum. */
template <class T, bool MOMENTS, class P> __device__ __forceinline__ Sums row_sums(P x, int64_t cols, float k) {
    const int E = 16 / sizeof(T);
    Sums s = no_sums();
    for (int64_t i = aligned_start<T>(x, cols) + (int64_t)threadIdx.x * E; i < cols; i += (int64_t)THREADS * E) {
        float v[E];
        load_padded<T>(x, cols, i, v);
        add<MOMENTS>(s, v, k);
    }
    return merge_block(s, k);
}

/* log2 beyond float32, without the registers of a float64 logarithm: one Newton step from log2f. */
__device__ __forceinline__ double log2_wide(float x) {
    float y = log2f(x);
    if (isinf(y) || y != y) return y;
    return (double)y + ((double)x * exp2f(-y) - 1.0) * LOG2E;
}

/* log(sum exp(scale v)) of what was summed with k = scale log2(e). */
__device__ __forceinline__ double log_sum_exp(const Sums &s, float scale) {
    return s.m == INFINITY ? (double)INFINITY : (double)s.m * scale + log2_wide(s.sum) * LN2;
}

#endif
