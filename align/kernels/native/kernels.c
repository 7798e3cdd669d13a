/* Every CPU kernel for every instruction set, behind a plain C interface. */
#include "scalar.h"

#include <pthread.h>

#define ISA scalar
#define ISA_LEVEL 0
#include "vector.h"
#include "../rows/rows.h"
#include "../sampling/sampling.h"
#undef ISA
#undef ISA_LEVEL

#if defined(__x86_64__)
#include <immintrin.h>

#define ISA avx2
#define ISA_LEVEL 1
#include "vector.h"
#include "../rows/rows.h"
#include "../sampling/sampling.h"
#undef ISA
#undef ISA_LEVEL

#define ISA avx512
#define ISA_LEVEL 2
#include "vector.h"
#include "../rows/rows.h"
#include "../sampling/sampling.h"
#undef ISA
#undef ISA_LEVEL

#include "../head/gemm.h"
#include "../head/amx.h"

#elif defined(__aarch64__)
#include <arm_neon.h>

#define ISA neon
#define ISA_LEVEL 3
#include "vector.h"
#include "../rows/rows.h"
#include "../sampling/sampling.h"
#undef ISA
#undef ISA_LEVEL
#endif

/* What the Python side asks for: see INTERFACE there. */
int align_interface_4(void) { return 4; }

/* The best instruction set here: 0 portable C, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16 products, 4 AMX tiles too; on Arm
 * 1 is NEON. */
int align_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return !__builtin_cpu_supports("avx512bf16") ? 2 : amx_usable() ? 4 : 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#elif defined(__aarch64__)
    return 1;
#endif
    return 0;
}

typedef void (*row_kernel)(const void *args, int64_t first, int64_t last);
typedef struct {
    row_kernel kernel;
    const void *args;
    int64_t first, last;
} job;

static void *run_job(void *p) {
    const job *j = p;
    j->kernel(j->args, j->first, j->last);
    return NULL;
}

#define MAX_THREADS 64

/* Some rows split evenly over threads; results do not depend on how many. */
static void over_range(row_kernel kernel, const void *args, int64_t first, int64_t last, int threads) {
    job jobs[MAX_THREADS];
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    int64_t rows = last - first;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > rows) threads = (int)rows;
    for (int t = 1; t < threads; t++) {
        jobs[t] = (job){kernel, args, first + rows * t / threads, first + rows * (t + 1) / threads};
        started[t] = pthread_create(&ids[t], NULL, run_job, &jobs[t]) == 0;
        if (!started[t]) run_job(&jobs[t]);
    }
    kernel(args, first, first + (threads > 1 ? rows / threads : rows));
    for (int t = 1; t < threads; t++)
        if (started[t]) pthread_join(ids[t], NULL);
}

static void over_rows(row_kernel kernel, const void *args, int64_t rows, int threads) {
    over_range(kernel, args, 0, rows, threads);
}

#if defined(__x86_64__)
#define PICK(name) (isa >= 2 ? name##_avx512 : isa == 1 ? name##_avx2 : name##_scalar)
#elif defined(__aarch64__)
#define PICK(name) (isa >= 1 ? name##_neon : name##_scalar)
#else
#define PICK(name) name##_scalar
#endif

void align_row_statistics(const row_statistics_args *args, int64_t rows, int isa, int threads) {
    (void)isa;
    over_rows(PICK(row_statistics), args, rows, threads);
}

/* Narrow rows lie at half their logits' distance or less, row r over logits up to row r / 2: 1, 1, 2, 4, ... rows at a
 * time write only over logits that have been read. */
void align_logit_gradient(const logit_gradient_args *args, int64_t rows, int isa, int threads) {
    int64_t last = args->out_row_bytes == args->row_bytes ? rows : 1;
    (void)isa;
    for (int64_t first = 0; first < rows; first = last, last = 2 * last)
        over_range(PICK(logit_gradient), args, first, last < rows ? last : rows, threads);
}

void align_softmax(const softmax_args *args, int64_t rows, int isa, int threads) {
    (void)isa;
    over_rows(PICK(softmax), args, rows, threads);
}

void align_sample(const sample_args *args, int64_t rows, int isa, int threads) {
    (void)isa;
    over_rows(PICK(sample), args, rows, threads);
}

/* out[n, v] = sum_h x[n, h] w[v, h] in float32 from bf16; 0 where this machine or its memory cannot. */
int align_linear_bf16(const linear_bf16_args *args, int isa, int threads) {
#if defined(__x86_64__)
    if (isa >= 4) return linear_amx(args, over_rows, threads);
    if (isa >= 3) return linear_bf16(args, over_rows, threads);
#else
    (void)args, (void)isa, (void)threads;
#endif
    return 0;
}
