/* What every instruction set shares: dtypes, one-element loads and stores, the arguments of each kernel. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LOG2E 1.4426950408889634

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { SOFTMAX, LOG_SOFTMAX, SPARSE, STABLEMAX, THREE_PASS };

typedef union { uint32_t bits; float value; } float_bits;

static inline float half_to_float(uint16_t h) {
    float_bits f;
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24 */
        float magnitude = (float)fraction * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    f.bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    return f.value;
}

static inline uint16_t float_to_half(float x) {
    float_bits f = {.value = x};
    uint16_t sign = (uint16_t)(f.bits >> 16 & 0x8000);
    f.bits &= 0x7fffffff;
    if (f.bits > 0x7f800000) return sign | 0x7e00;
    if (f.bits >= 0x477ff000) return sign | 0x7c00; /* rounds to infinity */
    if (f.bits < 0x38800000) return sign | (uint16_t)lrintf(f.value * 16777216.0f);
    return sign | (uint16_t)((f.bits - 0x38000000 + 0xfff + (f.bits >> 13 & 1)) >> 13);
}

static inline uint16_t float_to_bfloat16(float x) {
    float_bits f = {.value = x};
    return x != x ? 0x7fc0 : (uint16_t)((f.bits + 0x7fff + (f.bits >> 16 & 1)) >> 16);
}

static inline float scalar_load(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    if (dtype == FLOAT16) return half_to_float(half);
    return ((float_bits){.bits = (uint32_t)half << 16}).value;
}

static inline void scalar_store(void *p, int64_t i, float y, int dtype) {
    if (dtype == FLOAT32) ((float *)p)[i] = y;
    else ((uint16_t *)p)[i] = dtype == FLOAT16 ? float_to_half(y) : float_to_bfloat16(y);
}

static inline double stablemax_scalar(double x) { return x >= 0 ? 1 + x : 1 / (1 - x); }

typedef struct {
    const void *x;
    int64_t cols, row_bytes;
    const int64_t *targets; /* [rows, targets_per_row], negative = ignored */
    int64_t targets_per_row;
    double scale; /* of x, positive */
    float *logprob;
    double *logsumexp;
    float *entropy, *log_sum_sq; /* NULL: not wanted */
    int dtype;
} row_statistics_args;

typedef struct {
    float *z;
    int64_t cols, row_bytes, out_row_bytes; /* of z, and of the result that is written over it */
    const int64_t *targets;
    int64_t targets_per_row;
    const double *logsumexp;
    const float *a, *b, *c, *g; /* d = p (a + b log p + c p) + g at targets; b and c NULL: zero */
    double *scratch; /* as many as targets */
    float cap, slope; /* d is multiplied by (1 - (cap z)^2) slope */
    int dtype; /* of the result */
} logit_gradient_args;

typedef struct {
    const void *x;
    float *out;
    int64_t cols, row_bytes, keep; /* of x; out is contiguous */
    float *kept_value; /* [rows, keep], for SPARSE */
    int64_t *kept_place;
    int dtype, method, stream;
} softmax_args;

typedef struct {
    const void *logits;
    int64_t cols, row_bytes;
    const float *temperature, *top_p, *min_p; /* [rows], as everything below */
    const int64_t *top_k, *seed, *position;
    int64_t *token, *rank; /* rank may be NULL */
    float *raw, *processed, *entropy;
    int *failed; /* set where memory is missing */
    int dtype;
} sample_args;

typedef struct {
    const uint16_t *x, *w; /* bf16 [rows, width] and [columns, width], strides in elements */
    float *out;            /* [rows, columns] */
    int64_t rows, width, columns, x_stride, w_stride, out_stride;
} linear_bf16_args;
