/* One token per row: temperature, min-p, top-k, top-p, then an inverse-CDF draw; one block per row.
 *
 * Every filter is a threshold on the logit. Masses are 64-bit fixed point (2^-40 of the largest), so sums do not depend on
 * the order of threads. Without top-k and top-p the row is read three times (statistics, masses, rank), else four times
 * more for each of their radix searches; all but the first read come from cache at usual batch sizes.
 */
#include "../cuda/device.cuh"

#define SEGMENTS 256
#define BINS 256 /* as many as threads and segments */
#define UNIT 1099511627776.0f /* 2^40 */

/* Order-preserving bits of a float, and back. */
__device__ __forceinline__ uint32_t key_of(float v) {
    uint32_t bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ uint64_t mix(uint64_t x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
__device__ __forceinline__ double uniform(int64_t seed, int64_t position) {
    return (double)(mix((uint64_t)seed ^ mix((uint64_t)position)) >> 11) * 1.1102230246251565e-16; /* 2^-53 */
}

__device__ __forceinline__ uint64_t mass_of(float v, float top, float inverse) {
    return (uint64_t)(exp2f((v - top) * inverse) * UNIT);
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

__device__ __forceinline__ uint64_t warp_scan(uint64_t x) { /* inclusive */
    for (int step = 1; step < 32; step *= 2) {
        uint64_t left = __shfl_up_sync(0xffffffffu, x, step);
        if (threadIdx.x % 32 >= step) x += left;
    }
    return x;
}

struct Place { int at; uint64_t before; };

/* Where the running sum of at(0), at(1), ... of 256 weights first exceeds `goal` (else the last), and the sum before it;
 * for one whole warp. */
template <class At> __device__ __forceinline__ Place first_past(At at, uint64_t goal) {
    const int EACH = BINS / 32;
    int first = threadIdx.x % 32 * EACH, i = 0;
    uint64_t own = 0;
#pragma unroll 1
    for (int j = 0; j < EACH; j++) own += at(first + j);
    uint64_t before = warp_scan(own) - own;
    uint32_t past = __ballot_sync(0xffffffffu, before + own > goal);
    int lane = past ? __ffs(past) - 1 : 31;
    while (i < EACH - 1 && before + at(first + i) <= goal) before += at(first + i++);
    return {__shfl_sync(0xffffffffu, first + i, lane), __shfl_sync(0xffffffffu, before, lane)};
}

/* The largest key whose weight, with everything above it, reaches `count` elements or, for count 0, `share` of the mass of
 * what is not below the threshold. */
template <class T, class P>
__device__ __forceinline__ uint32_t radix_threshold(P x, int64_t cols, uint64_t count, float share, float top,
                                                    float threshold, float inverse) {
    SHARED(unsigned long long, bins, BINS);
    SHARED(uint32_t, found, 1);
    uint32_t prefix = 0;
    uint64_t passed = 0, goal = count; /* weight above the prefix; both known to the first warp alone */
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        bins[threadIdx.x] = 0;
        __syncthreads();
        for_each<T>(x, cols, [&](float v, int64_t) {
            uint32_t key = key_of(v);
            if (shift == 24 || key >> (shift + 8) == prefix) {
                uint64_t w = count ? 1 : v >= threshold ? mass_of(v, top, inverse) : 0;
                if (w) atomicAdd(&bins[key >> shift & 255], (unsigned long long)w);
            }
        });
        __syncthreads();
        if (threadIdx.x < 32) {
            if (goal == 0) {
                uint64_t total = 0;
                for (int b = threadIdx.x; b < BINS; b += 32) total += bins[b];
                goal = (uint64_t)((double)share * (double)warp_sum(total));
                goal = goal ? goal : 1;
            }
            Place place = first_past([&](int i) { return bins[BINS - 1 - i]; }, goal - 1 - passed);
            passed += place.before;
            if (threadIdx.x == 0) found[0] = prefix << 8 | (uint32_t)(BINS - 1 - place.at);
        }
        __syncthreads();
        prefix = found[0];
    }
    return prefix;
}

struct Drawn { int64_t token; float value; uint64_t total; };

/* Masses of SEGMENTS stretches of the row, one warp each; then the stretch and the element where the uniform falls. */
template <class T, class P>
__device__ __forceinline__ Drawn draw(P x, int64_t cols, float top, float threshold, float inverse, double u) {
    SHARED(unsigned long long, masses, SEGMENTS);
    SHARED(Drawn, result, 1);
    int lane = threadIdx.x % 32;
    int64_t length = (cols + SEGMENTS - 1) / SEGMENTS;
    auto mass = [&](int64_t v) -> uint64_t {
        float z = widen(x[v]);
        return z >= threshold ? mass_of(z, top, inverse) : 0;
    };
    for (int s = threadIdx.x / 32; s < SEGMENTS; s += WARPS) {
        int64_t last = (s + 1) * length < cols ? (s + 1) * length : cols;
        uint64_t sum = 0;
        for (int64_t v = s * length + lane; v < last; v += 32) sum += mass(v);
        sum = warp_sum(sum);
        if (lane == 0) masses[s] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        uint64_t total = 0;
        for (int s = lane; s < SEGMENTS; s += 32) total += masses[s];
        total = warp_sum(total);
        uint64_t goal = (uint64_t)(u * (double)total);
        if (total && goal >= total) goal = total - 1; /* rounding of the product */
        Place place = first_past([&](int s) { return masses[s]; }, goal);
        int64_t token = -1;
        uint64_t below = place.before;
        for (int64_t v = place.at * length; token < 0 && v < cols; v += 32) {
            uint64_t up_to = below + warp_scan(v + lane < cols ? mass(v + lane) : 0);
            uint32_t hit = __ballot_sync(0xffffffffu, up_to > goal);
            if (hit) token = v + __ffs(hit) - 1;
            below = __shfl_sync(0xffffffffu, up_to, 31);
        }
        if (lane == 0) result[0] = {token, token < 0 ? 0.0f : widen(x[token]), total};
    }
    __syncthreads();
    return result[0];
}

template <class T>
__device__ void sample(PTR(const T) logits, int64_t stride, int64_t cols, PTR(const float) temperature,
                       PTR(const int64_t) top_k, PTR(const float) top_p, PTR(const float) min_p, PTR(const int64_t) seed,
                       PTR(const int64_t) position, PTR(int64_t) token, PTR(float) raw, PTR(float) processed,
                       PTR(float) entropy, PTR(int64_t) rank) {
    SHARED(unsigned long long, counts, WARPS);
    int64_t row = blockIdx.x;
    auto x = logits + row * stride;
    float heat = temperature[row];
    Sums s = row_sums<T, true>(x, cols, (float)LOG2E);
    float top = s.m, inverse = heat > 0.0f ? (float)(LOG2E / heat) : 0.0f;
    float threshold = heat > 0.0f ? (min_p[row] > 0.0f ? top + logf(min_p[row]) * heat : -INFINITY) : top;
#pragma unroll 1
    for (int by_mass = 0; by_mass < 2; by_mass++) {
        bool wanted = by_mass ? top_p[row] < 1.0f : top_k[row] > 0 && top_k[row] < cols;
        if (heat <= 0.0f || !wanted) continue;
        uint64_t count = by_mass ? 0 : (uint64_t)top_k[row];
        uint32_t key = radix_threshold<T>(x, cols, count, top_p[row], top, threshold, inverse);
        threshold = fmaxf(threshold, value_of(key));
    }
    Drawn drawn = draw<T>(x, cols, top, threshold, inverse, heat > 0.0f ? uniform(seed[row], position[row]) : 0.0);

    uint64_t larger = 0;
    for_each<T>(x, cols, [&](float v, int64_t) { larger += v > drawn.value; });
    larger = warp_sum(larger);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = larger;
    __syncthreads();
    if (threadIdx.x == 0) {
        double log_sum = log2_wide(s.sum);
        larger = 0;
        for (int w = 0; w < WARPS; w++) larger += counts[w];
        token[row] = drawn.token;
        raw[row] = (float)((double)drawn.value - log_sum_exp(s, 1.0f));
        processed[row] = heat > 0.0f
            ? (float)(((drawn.value - top) * inverse - log2_wide((float)drawn.total / UNIT)) * LN2) : 0.0f;
        entropy[row] = (float)((log_sum - s.weighted / s.sum) * LN2);
        rank[row] = (int64_t)larger + 1;
    }
}

#define KERNELS(T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        sample_##T(PTR(const T) logits, int64_t stride, int64_t cols, PTR(const float) temperature,                 \
                   PTR(const int64_t) top_k, PTR(const float) top_p, PTR(const float) min_p, PTR(const int64_t) seed, \
                   PTR(const int64_t) position, PTR(int64_t) token, PTR(float) raw, PTR(float) processed,           \
                   PTR(float) entropy, PTR(int64_t) rank) {                                                         \
        sample<T>(logits, stride, cols, temperature, top_k, top_p, min_p, seed, position, token, raw, processed,    \
                  entropy, rank);                                                                                   \
    }
