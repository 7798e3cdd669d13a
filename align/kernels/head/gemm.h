/* bf16 x bf16 -> float32 matrix product for hidden states and an LM head, AVX-512 bf16.
 *
 * A panel is 32 rows of the weight, packed so that lane v of a vector holds the pair (h, h + 1) of weight row v; a block is
 * up to 14 rows of hidden states, packed pair by pair. 14 x 2 accumulators stay in registers over the whole width.
 */
#define BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define PANEL 32
#define BLOCK_ROWS 14

typedef struct {
    linear_bf16_args q;
    uint32_t *packed_x; /* [blocks][pairs][BLOCK_ROWS] */
    int64_t pairs, blocks, block_rows;
} linear_bf16_job;

static inline uint32_t pair_at(const uint16_t *row, int64_t width, int64_t pair) {
    return row[2 * pair] | (2 * pair + 1 < width ? (uint32_t)row[2 * pair + 1] << 16 : 0);
}

static void pack_x(const linear_bf16_job *job) {
    for (int64_t n = 0; n < job->q.rows; n++) {
        uint32_t *block = job->packed_x + n / job->block_rows * job->pairs * BLOCK_ROWS + n % job->block_rows;
        const uint16_t *row = job->q.x + n * job->q.x_stride;
        for (int64_t p = 0; p < job->pairs; p++) block[p * BLOCK_ROWS] = pair_at(row, job->q.width, p);
    }
}

/* 16 rows of 16 dwords -> 16 columns of 16 dwords. */
BF16 static inline void transpose16(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

BF16 static void pack_panel(const linear_bf16_job *job, int64_t first, uint32_t *packed) {
    for (int64_t half = 0; half < PANEL; half += 16) {
        for (int64_t p = 0; p < job->pairs; p += 16) {
            __m512i r[16];
            int64_t left = job->q.width - 2 * p;
            __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
            for (int64_t i = 0; i < 16; i++) {
                int64_t v = first + half + i;
                r[i] = v < job->q.columns ? _mm512_maskz_loadu_epi16(mask, job->q.w + v * job->q.w_stride + 2 * p)
                                          : _mm512_setzero_si512();
            }
            transpose16(r);
            for (int64_t i = 0; i < 16 && p + i < job->pairs; i++)
                _mm512_store_si512(packed + (p + i) * PANEL + half, r[i]);
        }
    }
}

#define ROWS_KERNEL(R)                                                                                              \
    BF16 static void product_##R(const uint32_t *x, const uint32_t *w, int64_t pairs, float *out, int64_t stride,   \
                                 __mmask16 low, __mmask16 high) {                                                   \
        __m512 acc[R][2];                                                                                           \
        for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();                                    \
        for (int64_t p = 0; p < pairs; p++) {                                                                       \
            __m512bh w0 = (__m512bh)_mm512_load_si512(w + p * PANEL);                                               \
            __m512bh w1 = (__m512bh)_mm512_load_si512(w + p * PANEL + 16);                                          \
            for (int r = 0; r < R; r++) {                                                                           \
                __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[p * BLOCK_ROWS + r]);                            \
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], pair, w0);                                                  \
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], pair, w1);                                                  \
            }                                                                                                       \
        }                                                                                                           \
        for (int r = 0; r < R; r++) {                                                                               \
            _mm512_mask_storeu_ps(out + r * stride, low, acc[r][0]);                                                \
            _mm512_mask_storeu_ps(out + r * stride + 16, high, acc[r][1]);                                          \
        }                                                                                                           \
    }

ROWS_KERNEL(1) ROWS_KERNEL(2) ROWS_KERNEL(3) ROWS_KERNEL(4) ROWS_KERNEL(5) ROWS_KERNEL(6) ROWS_KERNEL(7)
ROWS_KERNEL(8) ROWS_KERNEL(9) ROWS_KERNEL(10) ROWS_KERNEL(11) ROWS_KERNEL(12) ROWS_KERNEL(13) ROWS_KERNEL(14)

typedef void (*product)(const uint32_t *, const uint32_t *, int64_t, float *, int64_t, __mmask16, __mmask16);
static const product PRODUCTS[] = {NULL,      product_1, product_2,  product_3,  product_4,  product_5,  product_6, product_7,
                                   product_8, product_9, product_10, product_11, product_12, product_13, product_14};

static __mmask16 lanes(int64_t n) { return n <= 0 ? 0 : n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

/* Panels first to last of the weight against every row of hidden states. */
BF16 static void multiply_panels(const void *args, int64_t first, int64_t last) {
    const linear_bf16_job *job = args;
    const linear_bf16_args *q = &job->q;
    uint32_t *packed = aligned_alloc(64, (size_t)job->pairs * PANEL * 4);
    for (int64_t panel = first; panel < last; panel++) {
        int64_t v = panel * PANEL, left = q->columns - v;
        pack_panel(job, v, packed);
        for (int64_t b = 0; b < job->blocks; b++) {
            int64_t n = b * job->block_rows, rows = q->rows - n < job->block_rows ? q->rows - n : job->block_rows;
            PRODUCTS[rows](job->packed_x + b * job->pairs * BLOCK_ROWS, packed, job->pairs,
                           q->out + n * q->out_stride + v, q->out_stride, lanes(left), lanes(left - 16));
        }
    }
    free(packed);
}

static int linear_bf16(const linear_bf16_args *q, void (*over)(void (*)(const void *, int64_t, int64_t), const void *, int64_t, int),
                       int threads) {
    linear_bf16_job job = {.q = *q, .pairs = (q->width + 1) / 2, .blocks = (q->rows + BLOCK_ROWS - 1) / BLOCK_ROWS};
    job.block_rows = (q->rows + job.blocks - 1) / job.blocks;
    job.packed_x = malloc((size_t)job.blocks * job.pairs * BLOCK_ROWS * 4);
    if (job.packed_x == NULL) return 0;
    pack_x(&job);
    over(multiply_panels, &job, (q->columns + PANEL - 1) / PANEL, threads);
    free(job.packed_x);
    return 1;
}
