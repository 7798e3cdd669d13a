/* The product of gemm.h on AMX tiles: 32 x 32 results in four tiles, 32 of the width at a time.
 *
 * A panel of the weight packed in pairs (gemm.h) is what AMX takes as its right side; rows of hidden states are its left
 * side as they lie, padded with zeros to whole tiles.
 */
#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define TILE_ROWS 16
#define TILE_PAIRS 16

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether processor and kernel let this process use tiles; Linux grants them on request. */
static int amx_usable(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return 0;
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_config;

/* out [32, 32] = x [32, 2 pairs] w [pairs, 32]; both of whole tiles. */
AMX static inline void product_tiles(const uint16_t *x, int64_t width, const uint32_t *w, int64_t pairs, float *out, int64_t stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t p = 0; p < pairs; p += TILE_PAIRS) {
        _tile_loadd(4, x + 2 * p, width * 2);
        _tile_loadd(5, x + TILE_ROWS * width + 2 * p, width * 2);
        _tile_loadd(6, w + p * PANEL, PANEL * 4);
        _tile_loadd(7, w + p * PANEL + 16, PANEL * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, out + 16, stride * 4);
    _tile_stored(2, out + TILE_ROWS * stride, stride * 4);
    _tile_stored(3, out + TILE_ROWS * stride + 16, stride * 4);
}

AMX static void multiply_panels_amx(const void *args, int64_t first, int64_t last) {
    const linear_bf16_job *job = args;
    const linear_bf16_args *q = &job->q;
    const uint16_t *x = (const uint16_t *)job->packed_x;
    int64_t width = 2 * job->pairs;
    tile_config config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = 16;
    uint32_t *packed = aligned_alloc(64, (size_t)job->pairs * PANEL * 4);
    float edge[32 * 32];
    _tile_loadconfig(&config);
    for (int64_t panel = first; panel < last; panel++) {
        int64_t v = panel * PANEL, columns = q->columns - v < PANEL ? q->columns - v : PANEL;
        pack_panel(job, v, packed);
        for (int64_t n = 0; n < q->rows; n += 32) {
            float *out = q->out + n * q->out_stride + v;
            int64_t rows = q->rows - n < 32 ? q->rows - n : 32;
            if (rows == 32 && columns == PANEL) {
                product_tiles(x + n * width, width, packed, job->pairs, out, q->out_stride);
                continue;
            }
            product_tiles(x + n * width, width, packed, job->pairs, edge, 32);
            for (int64_t r = 0; r < rows; r++) memcpy(out + r * q->out_stride, edge + r * 32, (size_t)columns * 4);
        }
    }
    _tile_release();
    free(packed);
}

static int linear_amx(const linear_bf16_args *q, void (*over)(void (*)(const void *, int64_t, int64_t), const void *, int64_t, int),
                      int threads) {
    linear_bf16_job job = {.q = *q, .pairs = (q->width + 31) / 32 * TILE_PAIRS};
    int64_t rows = (q->rows + 31) / 32 * 32, width = 2 * job.pairs;
    uint16_t *x = calloc((size_t)(rows * width), 2);
    if (x == NULL) return 0;
    for (int64_t n = 0; n < q->rows; n++) memcpy(x + n * width, q->x + n * q->x_stride, (size_t)q->width * 2);
    job.packed_x = (uint32_t *)x;
    over(multiply_panels_amx, &job, (q->columns + PANEL - 1) / PANEL, threads);
    free(x);
    return 1;
}
