/* The kernels' own sources, compiled for the host, behind a C interface; `order` seeds the threads' schedule. */
#include "cuda_on_host.h"

#include "contrast/contrast.cu"
KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)
#undef KERNELS

#include "rows/rows.cu"
KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)
#undef KERNELS

#include "sampling/sampling.cu"
KERNELS(f32)
KERNELS(bf16)
KERNELS(f16)

/* Count in `touched` how often each element of x is accessed from now on; NULL for none. */
extern "C" void sim_watch(void *x, int64_t *touched) {
    sim::watched = x;
    sim::touched = touched;
}

template <class T> static Checked<T> view(void *p, int64_t size) { return {(T *)p, 0, size}; }

#define INTERFACE(T)                                                                                                \
    extern "C" void sim_row_statistics_##T(unsigned order, int64_t rows, void *x, int64_t stride, int64_t cols,     \
                                           float scale, void *targets, int64_t per_row, void *logprob, void *lse,   \
                                           void *entropy, void *log_sum_sq, int64_t moments) {                          \
        sim::launch(rows, order, [&] {                                                                              \
            row_statistics_##T(view<const T>(x, rows * stride), stride, cols, scale,                                \
                               view<const int64_t>(targets, rows * per_row), per_row,                               \
                               view<float>(logprob, rows * per_row), view<double>(lse, rows),                       \
                               view<float>(entropy, rows), view<float>(log_sum_sq, rows), moments);                 \
        });                                                                                                         \
    }                                                                                                               \
    extern "C" void sim_logit_gradient_##T(unsigned order, int64_t rows, void *z, int64_t stride, int64_t cols,     \
                                           void *targets, int64_t per_row, void *lse, void *a, void *b, void *c,    \
                                           void *g, float cap, float slope, int64_t quadratic) {                        \
        sim::launch(rows, order, [&] {                                                                              \
            logit_gradient_##T(view<float>(z, rows * stride), stride, cols,                                         \
                               view<const int64_t>(targets, rows * per_row), per_row, view<const double>(lse, rows), \
                               view<const float>(a, rows), view<const float>(b, rows), view<const float>(c, rows),  \
                               view<const float>(g, rows * per_row), cap, slope, quadratic);                        \
        });                                                                                                         \
    }                                                                                                               \
    extern "C" void sim_softmax_##T(unsigned order, int64_t rows, void *x, int64_t stride, int64_t cols, void *out, \
                                    int64_t method) {                                                                   \
        sim::launch(rows, order, [&] {                                                                              \
            softmax_##T(view<const T>(x, rows * stride), stride, cols, view<float>(out, rows * cols), method);      \
        });                                                                                                         \
    }                                                                                                               \
    extern "C" void sim_contrast_logits_##T(unsigned order, int64_t rows, void *z, int64_t stride, int64_t cols,    \
                                            void *pair, void *alpha, float log_tau, void *out) {                    \
        sim::launch(rows, order, [&] {                                                                              \
            contrast_logits_##T(view<const T>(z, rows * stride), stride, cols, view<const int64_t>(pair, rows),     \
                                view<const float>(alpha, rows), log_tau, view<float>(out, rows * cols));            \
        });                                                                                                         \
    }                                                                                                               \
    extern "C" void sim_sample_##T(unsigned order, int64_t rows, void *x, int64_t stride, int64_t cols,             \
                                   void *temperature, void *top_k, void *top_p, void *min_p, void *seed,            \
                                   void *position, void *token, void *raw, void *processed, void *entropy,          \
                                   void *rank) {                                                                    \
        sim::launch(rows, order, [&] {                                                                              \
            sample_##T(view<const T>(x, rows * stride), stride, cols, view<const float>(temperature, rows),         \
                       view<const int64_t>(top_k, rows), view<const float>(top_p, rows),                            \
                       view<const float>(min_p, rows), view<const int64_t>(seed, rows),                             \
                       view<const int64_t>(position, rows), view<int64_t>(token, rows), view<float>(raw, rows),     \
                       view<float>(processed, rows), view<float>(entropy, rows), view<int64_t>(rank, rows));        \
        });                                                                                                         \
    }

INTERFACE(f32)
INTERFACE(bf16)
INTERFACE(f16)
