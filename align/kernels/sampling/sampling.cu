/* One token per row: temperature, min-p, top-k, top-p, then an inverse-CDF draw; one block per row.
 *
 * A row is cut into contiguous segments. One read gives the row's statistics, and each segment's largest logit and sum
 * at the row's temperature; the uniform number picks a segment by these sums, and that segment alone is read again for
 * the token. Every filter is a threshold on the logit: filters and rank read again only segments whose largest logit
 * reaches it, or a lower bound of it that the first read gives. Masses are 64-bit fixed point (2^-40 of the largest),
 * so sums do not depend on the order of threads. Tests on the simulator count the reads; no GPU has timed them.
 */
#include "../cuda/device.cuh"

#define SEGMENTS 512 /* at most; of 2 KB each unless the row is longer than 1 MB */
#define VECTORS 4 /* 16-byte loads that a thread has in flight in the first read */
#define BINS 256 /* as many as threads */
#define UNIT 1099511627776.0f /* 2^40 */

/* Order-preserving bits of a float, and back; BITS leading ones tell the values of a type apart. */
__device__ __forceinline__ uint32_t key_of(float v) {
    uint32_t bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
template <class T> struct Keys;
template <> struct Keys<f32> { static const int BITS = 32; };
template <> struct Keys<f16> { static const int BITS = 24; };
template <> struct Keys<bf16> { static const int BITS = 16; };

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

template <class X> __device__ __forceinline__ X warp_sum(X x) {
    for (int mask = 16; mask > 0; mask >>= 1) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
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

/* Where the running sum of N weights at(0), at(1), ... first exceeds `goal` (else the last), and the sum before it; for
 * one whole warp. */
template <int N, class At> __device__ __forceinline__ Place first_past(At at, uint64_t goal) {
    const int EACH = N / 32;
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

struct Segment {
    float best, origin, sum; /* largest logit; sum of e^((v - origin) / temperature) */
};

/* A row in segments of `length` from `first` on, where 16-byte loads are aligned; one warp reads a segment. The
 * first read fills in the rest. */
template <class T, class P> struct Row {
    P x;
    int64_t cols, first, length;
    int count;
    float inverse; /* log2(e) / temperature */

    Segment *segments;
    unsigned long long *masses; /* of the segments: of what reaches the threshold */
    float top, threshold; /* the largest logit, the least that may be drawn */
};

template <class T, class P> __device__ __forceinline__ Row<T, P> in_segments(P x, int64_t cols, float inverse) {
    SHARED(Segment, segments, SEGMENTS);
    SHARED(unsigned long long, masses, SEGMENTS);
    const int TILE = 32 * VECTORS * 16 / sizeof(T);
    int64_t first = aligned_start<T>(x, cols), tiles = (cols - first + TILE - 1) / TILE;
    int64_t length = (tiles + SEGMENTS - 1) / SEGMENTS * TILE;
    int count = (int)((cols - first + length - 1) / length);
    return {x, cols, first, length, count, inverse, segments, masses, -INFINITY, -INFINITY};
}

/* Call f(E values, index of the first) in every lane of a warp until segment g is read. */
template <class T, class P, class Visit>
__device__ __forceinline__ void for_segment(const Row<T, P> &row, int g, Visit f) {
    const int E = 16 / sizeof(T);
    int64_t from = row.first + g * row.length, end = from + row.length;
#pragma unroll 1
    for (; from < end && from < row.cols; from += 32 * E) {
        float v[E];
        int64_t i = from + threadIdx.x % 32 * E;
        load_padded<T>(row.x, row.cols, i, v);
        f(v, i);
    }
}

/* Call f(value) for the elements of all segments whose largest logit is at least `least`. */
template <class T, class P, class Visit>
__device__ __forceinline__ void for_segments(const Row<T, P> &row, float least, Visit f) {
#pragma unroll 1
    for (int g = threadIdx.x / 32; g < row.count; g += WARPS)
        if (row.segments[g].best >= least)
            for_segment(row, g, [&](auto &v, int64_t) {
#pragma unroll
                for (float one : v) f(one);
            });
}

/* The VECTORS x 32 E elements from `from`, all loads before the first use; -inf outside the row. */
template <class T, class P, int E>
__device__ __forceinline__ void load_tile(const Row<T, P> &row, int64_t from, float (&v)[VECTORS][E]) {
    int64_t i = from + threadIdx.x % 32 * E;
    if (from >= 0 && from + 32 * VECTORS * E <= row.cols) {
        uint4 raw[VECTORS];
#pragma unroll
        for (int j = 0; j < VECTORS; j++) raw[j] = load16(row.x + (i + j * 32 * E));
#pragma unroll
        for (int j = 0; j < VECTORS * E; j++) v[j / E][j % E] = element<T>(raw[j / E], j % E);
    } else {
#pragma unroll
        for (int j = 0; j < VECTORS; j++) load_padded<T>(row.x, row.cols, i + j * 32 * E, v[j]);
    }
}

/* The one read: the row's sums at temperature 1, without squares, and its segments; WARM at other temperatures. */
template <bool WARM, class T, class P> __device__ __forceinline__ Sums read_once(const Row<T, P> &row) {
    const int E = 16 / sizeof(T);
    Sums s = no_sums(); /* m is the same in all of a warp */
#pragma unroll 1
    for (int g = threadIdx.x / 32; g < row.count; g += WARPS) {
        float best = -INFINITY, mass = 0.0f;
        int64_t from = row.first + g * row.length, end = from + row.length;
#pragma unroll 1
        for (; from < end && from < row.cols; from += 32 * VECTORS * E) {
            float v[VECTORS][E], m = -INFINITY, sum = 0.0f, warm = 0.0f;
            load_tile(row, from, v);
#pragma unroll
            for (int j = 0; j < VECTORS * E; j++) m = fmaxf(m, v[j / E][j % E]);
            m = warp_max(m);
            best = fmaxf(best, m);
            if (m > s.m) {
                mass *= exp2f((s.m - m) * row.inverse);
                rebase(s, m, (float)LOG2E);
            }
            float origin = s.m == -INFINITY ? 0.0f : s.m;
#pragma unroll
            for (int j = 0; j < VECTORS * E; j++) {
                float above = v[j / E][j % E] - origin, d = above * (float)LOG2E, e = exp2f(d);
                sum += e;
                s.weighted += e * fmaxf(d, -1e4f);
                if (WARM) warm += exp2f(above * row.inverse);
            }
            s.sum += sum;
            mass += WARM ? warm : sum;
        }
        mass = warp_sum(mass);
        if (threadIdx.x % 32 == 0) row.segments[g] = {best, s.m, mass};
    }
    return merge_block(s, (float)LOG2E);
}

/* Masses of the segments from their sums, without a threshold. */
template <class T, class P> __device__ __forceinline__ void take_masses(const Row<T, P> &row) {
    for (int g = threadIdx.x; g < SEGMENTS; g += THREADS) {
        Segment s = g < row.count ? row.segments[g] : Segment{-INFINITY, -INFINITY, 0.0f};
        row.masses[g] = (uint64_t)(s.sum * exp2f((s.origin - row.top) * row.inverse) * UNIT);
    }
    __syncthreads();
}

/* Masses of the segments by sums over what reaches the threshold. */
template <class T, class P> __device__ __forceinline__ void weigh(const Row<T, P> &row) {
    __syncthreads(); /* the masses from before may still be read */
#pragma unroll 1
    for (int g = threadIdx.x / 32; g < row.count; g += WARPS) {
        uint64_t sum = 0;
        if (row.segments[g].best >= row.threshold)
            for_segment(row, g, [&](auto &v, int64_t) {
#pragma unroll
                for (float one : v) sum += one >= row.threshold ? mass_of(one, row.top, row.inverse) : 0;
            });
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) row.masses[g] = sum;
    }
    __syncthreads();
}

template <class T, class P> __device__ __forceinline__ uint64_t total_of(const Row<T, P> &row) {
    uint64_t total = 0;
#pragma unroll 1
    for (int g = threadIdx.x % 32; g < SEGMENTS; g += 32) total += row.masses[g];
    return warp_sum(total);
}

/* The value down to which the elements' weights reach `goal`, or less than it but more than the type's next; NaN if
 * they never do. each(least, f) calls f(value, weight) for the elements and may leave out those below `least`. */
template <int BITS, class Each> __device__ __forceinline__ float value_at(Each each, uint64_t goal) {
    SHARED(unsigned long long, bins, BINS);
    SHARED(uint32_t, found, 1);
    uint32_t prefix = 0, mask = 0;
    uint64_t passed = 0; /* weight above the prefix, known to the first warp alone */
#pragma unroll 1
    for (int shift = 24; shift >= 32 - BITS; shift -= 8) {
        __syncthreads();
        bins[threadIdx.x] = 0;
        __syncthreads();
        each(value_of(prefix), [&](float v, uint64_t weight) {
            uint32_t key = key_of(v);
            if ((key & mask) == prefix) atomicAdd(&bins[key >> shift & 255], (unsigned long long)weight);
        });
        __syncthreads();
        if (threadIdx.x < 32) {
            Place place = first_past<BINS>([&](int i) { return bins[BINS - 1 - i]; }, goal - 1 - passed);
            passed += place.before;
            if (threadIdx.x == 0) found[0] = prefix | (uint32_t)(BINS - 1 - place.at) << shift;
        }
        __syncthreads();
        prefix = found[0];
        mask |= 255u << shift;
    }
    return value_of(prefix);
}

/* To the smallest float that min-p keeps, compared as the definition does in float64; not above the largest logit. */
template <class T, class P> __device__ __forceinline__ void raise_by_min_p(Row<T, P> &row, double heat, double min_p) {
    double limit = row.top / heat + log(min_p);
    float least = (float)(limit * heat);
    row.threshold = fminf(least / heat < limit ? nextafterf(least, INFINITY) : least, row.top);
}

/* First to a value that k elements reach, the k-th largest of the segments' best; then to the k-th largest element. */
template <class T, class P> __device__ __forceinline__ void raise_by_top_k(Row<T, P> &row, uint64_t k) {
    auto best = [&](float, auto tally) {
        for (int g = threadIdx.x; g < row.count; g += THREADS) tally(row.segments[g].best, 1);
    };
    auto elements = [&](float least, auto tally) {
        for_segments(row, fmaxf(row.threshold, least), [&](float v) {
            if (v >= row.threshold) tally(v, 1);
        });
    };
    row.threshold = fmaxf(row.threshold, value_at<Keys<T>::BITS>(best, k));
    row.threshold = fmaxf(row.threshold, value_at<Keys<T>::BITS>(elements, k));
}

/* First to the probability (1 - share) / cols, for all below have less than 1 - share together; then to the nucleus. */
template <class T, class P> __device__ __forceinline__ void raise_by_top_p(Row<T, P> &row, double share) {
    double total = (double)total_of(row);
    float least = (float)((1.0 - share) * 0.999 * total / UNIT / (double)row.cols); /* less, for rounding */
    auto elements = [&](float least, auto tally) {
        for_segments(row, fmaxf(row.threshold, least), [&](float v) {
            if (v >= row.threshold) tally(v, mass_of(v, row.top, row.inverse));
        });
    };
    row.threshold = fmaxf(row.threshold, nextafterf(row.top + log2f(least) / row.inverse, -INFINITY));
    row.threshold = fmaxf(row.threshold, value_at<Keys<T>::BITS>(elements, (uint64_t)fmax(share * total, 1.0)));
}

/* The threshold, and the masses of what reaches it. */
template <class T, class P>
__device__ __forceinline__ void filter(Row<T, P> &row, float heat, int64_t k, float share, float min_p) {
    if (heat > 0.0f) {
        if (min_p > 0.0f) raise_by_min_p(row, heat, min_p);
        if (k > 0 && k < row.cols) raise_by_top_k(row, (uint64_t)k);
        if (share < 1.0f && row.threshold > -INFINITY) weigh(row);
        if (share < 1.0f) raise_by_top_p(row, fmaxf(share, 0.0f));
    } else
        row.threshold = row.top;
    if (row.threshold > -INFINITY) weigh(row);
}

struct Drawn { int64_t token; float value; };

/* The segment, then in it the element where the uniform number falls; for one whole warp. Elements weigh relative to
 * the largest of their segment, which so never rounds to nothing; where their sum rounds to less than the segment's,
 * the last that weighs anything is drawn. */
template <class T, class P> __device__ __forceinline__ Drawn draw(const Row<T, P> &row, uint64_t total, double u) {
    uint64_t goal = (uint64_t)(u * (double)total), below = 0;
    if (goal >= total) goal = total - 1; /* rounding of the product */
    Place place = first_past<SEGMENTS>([&](int g) { return row.masses[g]; }, goal);
    float best = row.segments[place.at].best;
    goal = (uint64_t)((double)(goal - place.before) * exp2f((row.top - best) * row.inverse));
    Drawn drawn = {-1, 0.0f};
    for_segment(row, place.at, [&](auto &v, int64_t i) {
        if (below > goal) return; /* found */
        auto mass = [&](float one) -> uint64_t { return one >= row.threshold ? mass_of(one, best, row.inverse) : 0; };
        uint64_t own = 0;
#pragma unroll
        for (float one : v) own += mass(one);
        uint64_t up_to = below + warp_scan(own), running = up_to - own;
        Drawn last = {-1, 0.0f}; /* that weighs anything, of this lane's elements up to the goal */
#pragma unroll
        for (float one : v) {
            if (running <= goal && mass(one) > 0) last = {i, one};
            running += running <= goal ? mass(one) : 0;
            i++;
        }
        uint32_t reach = __ballot_sync(0xffffffffu, up_to > goal), some = __ballot_sync(0xffffffffu, own > 0);
        int lane = reach ? __ffs(reach) - 1 : 31 - __clz((int)some);
        if (some) drawn = {__shfl_sync(0xffffffffu, last.token, lane), __shfl_sync(0xffffffffu, last.value, lane)};
        below = __shfl_sync(0xffffffffu, up_to, 31);
    });
    return drawn;
}

/* 1 and how many logits are larger; for the first thread. */
template <class T, class P> __device__ __forceinline__ int64_t rank_of(const Row<T, P> &row, float value) {
    SHARED(unsigned long long, counts, WARPS);
    uint64_t larger = 0;
    for_segments(row, value, [&](float v) { larger += v > value; });
    larger = warp_sum(larger);
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = larger;
    __syncthreads();
    larger = 1;
    for (int w = 0; w < WARPS; w++) larger += counts[w];
    return (int64_t)larger;
}

template <class T>
__device__ void sample(PTR(const T) logits, int64_t stride, int64_t cols, PTR(const float) temperature,
                       PTR(const int64_t) top_k, PTR(const float) top_p, PTR(const float) min_p,
                       PTR(const int64_t) seed, PTR(const int64_t) position, PTR(int64_t) token, PTR(float) raw,
                       PTR(float) processed, PTR(float) entropy, PTR(int64_t) rank) {
    SHARED(Drawn, result, 1);
    int64_t r = blockIdx.x;
    float heat = temperature[r], inverse = (float)(LOG2E / (heat > 0.0f ? heat : 1.0f));
    auto row = in_segments<T>(logits + r * stride, cols, inverse);
    Sums s = inverse == (float)LOG2E ? read_once<false>(row) : read_once<true>(row);
    bool valid = heat >= 0.0f && heat < INFINITY && top_k[r] >= 0 && top_p[r] > 0.0f && top_p[r] <= 1.0f &&
                 min_p[r] >= 0.0f && min_p[r] <= 1.0f;
    bool proper = valid && s.sum > 0.0f && s.m < INFINITY; /* neither -inf everywhere nor NaN or +inf anywhere */
    uint64_t total = 0;
    if (proper) {
        row.top = s.m;
        take_masses(row);
        filter(row, heat, top_k[r], top_p[r], min_p[r]);
        total = total_of(row);
    }
    if (threadIdx.x < 32) {
        double u = heat > 0.0f ? uniform(seed[r], position[r]) : 0.0;
        Drawn drawn = proper ? draw(row, total, u) : Drawn{0, widen(row.x[0])};
        if (threadIdx.x == 0) result[0] = drawn;
    }
    __syncthreads();
    Drawn drawn = result[0];
    int64_t place = rank ? rank_of(row, drawn.value) : 0;
    if (threadIdx.x > 0) return;
    double log_sum = log2_wide(s.sum), log_p = (drawn.value - s.m) * inverse - log2_wide((float)total / UNIT);
    token[r] = drawn.token;
    raw[r] = proper ? (float)((double)drawn.value - log_sum_exp(s, 1.0f)) : NAN;
    processed[r] = !(heat > 0.0f) ? 0.0f : proper ? (float)(log_p * LN2) : NAN;
    entropy[r] = proper ? (float)((log_sum - s.weighted / s.sum) * LN2) : NAN;
    if (rank) rank[r] = place;
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
