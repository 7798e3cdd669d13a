/* Contrastive logits: one block per row. */
#include "../cuda/device.cuh"

/* out = (1 + alpha) z - alpha z[pair] where z >= max z + log tau, -inf elsewhere; a row without a pair is copied. */
template <class T>
__device__ void contrast_logits(PTR(const T) z, int64_t stride, int64_t cols, PTR(const int64_t) pair,
                                PTR(const float) alpha, float log_tau, PTR(float) out) {
    SHARED(float, largest, WARPS);
    int64_t row = blockIdx.x, other = pair[row];
    auto to = out + row * cols;
    float a = alpha[row], m = -INFINITY;
    for_each<T>(z + row * stride, cols, [&](float v, int64_t) { m = fmaxf(m, v); });
    for (int mask = 16; mask > 0; mask >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, mask));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = m;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, largest[w]);
    auto against = z + (other < 0 ? row : other) * stride;
    for_each<T>(z + row * stride, cols, [&](float v, int64_t i) {
        to[i] = other < 0 ? v : v >= m + log_tau ? (1.0f + a) * v - a * widen(against[i]) : -INFINITY;
    });
}

#define KERNELS(T)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        contrast_logits_##T(PTR(const T) z, int64_t stride, int64_t cols, PTR(const int64_t) pair,                  \
                            PTR(const float) alpha, float log_tau, PTR(float) out) {                                \
        contrast_logits<T>(z, stride, cols, pair, alpha, log_tau, out);                                             \
    }
