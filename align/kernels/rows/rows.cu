/* Row statistics, gradient of logits in place, softmax and log-softmax: one block per row. */
#include "../cuda/device.cuh"

/* log-sum-exp, log-probs of targets, entropy, log sum p^2 of softmax(scale x); one read of the row. */
template <class T, bool MOMENTS>
__device__ void row_statistics(PTR(const T) x, int64_t stride, int64_t cols, float scale, PTR(const int64_t) targets,
                               int64_t per_row, PTR(float) logprob, PTR(double) logsumexp, PTR(float) entropy,
                               PTR(float) log_sum_sq) {
    int64_t row = blockIdx.x;
    float k = (float)(scale * LOG2E);
    Sums s = row_sums<T, MOMENTS>(x + row * stride, cols, k);
    double lse = log_sum_exp(s, scale), log_sum = log2_wide(s.sum);
    for (int64_t m = threadIdx.x; m < per_row; m += THREADS) {
        int64_t y = targets[row * per_row + m];
        double above = y < 0 ? 0.0 : ((double)widen(x[row * stride + y]) - s.m) * scale;
        logprob[row * per_row + m] = y < 0 ? 0.0f : (float)(above - log_sum * LN2);
    }
    if (threadIdx.x == 0) {
        logsumexp[row] = lse;
        if (MOMENTS) {
            entropy[row] = (float)((log_sum - s.weighted / s.sum) * LN2);
            log_sum_sq[row] = (float)((log2_wide(s.squared) - 2 * log_sum) * LN2);
        }
    }
}

/* d = (p (a + b log p + c p) + g at targets) (1 - (cap z)^2) slope over float32 z, in any dtype from the row's start. */
template <class T>
__device__ void logit_gradient(PTR(float) z, int64_t stride, int64_t cols, PTR(const int64_t) targets, int64_t per_row,
                               PTR(const double) logsumexp, PTR(const float) a, PTR(const float) b, PTR(const float) c,
                               PTR(const float) g, float cap, float slope, int64_t quadratic) {
    const int PER_THREAD = 4;
    int64_t row = blockIdx.x;
    float high = (float)logsumexp[row], low = isinf(high) ? 0.0f : (float)(logsumexp[row] - high);
    float ra = a[row], rb = quadratic ? b[row] : 0.0f, rc = quadratic ? c[row] : 0.0f, d[PER_THREAD];
    auto from = z + row * stride;
    for (int64_t tile = 0; tile < cols; tile += THREADS * PER_THREAD) {
        for (int j = 0; j < PER_THREAD; j++) {
            int64_t v = tile + j * THREADS + threadIdx.x;
            if (v >= cols) continue;
            float logit = from[v], log_p = logit - high - low, p = exp2f(log_p * (float)LOG2E);
            float bent = cap == 0.0f ? 0.0f : cap * logit;
            d[j] = p * (ra + rb * fmaxf(log_p, -1e4f) + rc * p);
            for (int64_t m = 0; m < per_row; m++)
                if (targets[row * per_row + m] == v) d[j] += g[row * per_row + m];
            d[j] *= (1.0f - bent * bent) * slope;
        }
        __syncthreads(); /* the tile is read before any of it is overwritten; later tiles lie beyond what is written */
        for (int j = 0; j < PER_THREAD; j++) {
            int64_t v = tile + j * THREADS + threadIdx.x;
            if (v < cols) narrow(d[j], NARROWED(T, from, v));
        }
    }
}

/* Two reads of the row (the second from cache) and one write. */
template <class T>
__device__ void softmax(PTR(const T) x, int64_t stride, int64_t cols, PTR(float) out, int64_t log_space) {
    int64_t row = blockIdx.x;
    float k = (float)LOG2E;
    auto from = x + row * stride;
    auto to = out + row * cols;
    Sums s = row_sums<T, false>(from, cols, k);
    double lse = log_sum_exp(s, 1.0f);
    float high = (float)lse, low = isinf(high) ? 0.0f : (float)(lse - high), inverse = 1.0f / s.sum;
    if (log_space)
        for_each<T>(from, cols, [&](float v, int64_t i) { to[i] = v - high - low; });
    else
        for_each<T>(from, cols, [&](float v, int64_t i) { to[i] = exp2f((v - s.m) * k) * inverse; });
}

enum { SOFTMAX, LOG_SOFTMAX, SPARSE, STABLEMAX }; /* as on the CPU */

/* s(x) = 1 + x above 0 and 1 / (1 - x) below, over its sum; reads and writes as softmax. */
template <class T> __device__ void stablemax(PTR(const T) x, int64_t stride, int64_t cols, PTR(float) out) {
    auto grown = [](float v) { return v >= 0.0f ? 1.0f + v : 1.0f / (1.0f - v); };
    int64_t row = blockIdx.x;
    auto from = x + row * stride;
    auto to = out + row * cols;
    Sums s = {0.0f, 0.0f, 0.0f, 0.0f};
    for_each<T>(from, cols, [&](float v, int64_t) { s.sum += grown(v); });
    float inverse = 1.0f / merge_block(s, 1.0f).sum;
    for_each<T>(from, cols, [&](float v, int64_t i) { to[i] = grown(v) * inverse; });
}

#define KERNELS(T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        row_statistics_##T(PTR(const T) x, int64_t stride, int64_t cols, float scale, PTR(const int64_t) targets,   \
                           int64_t per_row, PTR(float) logprob, PTR(double) logsumexp, PTR(float) entropy,          \
                           PTR(float) log_sum_sq, int64_t moments) {                                                    \
        if (moments)                                                                                                \
            row_statistics<T, true>(x, stride, cols, scale, targets, per_row, logprob, logsumexp, entropy, log_sum_sq); \
        else                                                                                                        \
            row_statistics<T, false>(x, stride, cols, scale, targets, per_row, logprob, logsumexp, entropy, log_sum_sq); \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        logit_gradient_##T(PTR(float) z, int64_t stride, int64_t cols, PTR(const int64_t) targets, int64_t per_row, \
                           PTR(const double) logsumexp, PTR(const float) a, PTR(const float) b, PTR(const float) c, \
                           PTR(const float) g, float cap, float slope, int64_t quadratic) {                             \
        logit_gradient<T>(z, stride, cols, targets, per_row, logsumexp, a, b, c, g, cap, slope, quadratic);         \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        softmax_##T(PTR(const T) x, int64_t stride, int64_t cols, PTR(float) out, int64_t method) {                     \
        if (method == STABLEMAX)                                                                                            \
            stablemax<T>(x, stride, cols, out);                                                                     \
        else                                                                                                        \
            softmax<T>(x, stride, cols, out, method);                                                               \
    }
