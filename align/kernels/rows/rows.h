/* Kernels over the rows of a matrix; included once per instruction set after native/vector.h.
 *
 * Two passes (Dukhan and Ablavatski, 2001.04438): the running sum of exponentials is a mantissa and an exponent, so no
 * pass looks for the maximum first. Here the exponent `c` is kept per row and moves only when an element outgrows it by
 * 2^30, which a row does a few times at most; sums are float32 within a segment and float64 across segments.
 */

#undef BLOCK
#undef SEGMENT
#define BLOCK (8 * W)
#define SEGMENT (64 * BLOCK)

typedef struct {
    float c;              /* elements are summed as 2^(x k - c) */
    double sum;           /* of e = 2^(x k - c) */
    double weighted;      /* of e (x k - c) */
    double squared;       /* of e e */
    float top;            /* largest x; with moments only, as the two above */
} F(stats);

typedef struct { vf sum[4], weighted[2], squared[2], top; } F(lanes);

FN void F(clear)(F(lanes) * a) {
    for (int j = 0; j < 4; j++) a->sum[j] = vzero();
    for (int j = 0; j < 2; j++) a->weighted[j] = a->squared[j] = vzero();
    a->top = vset1(-INFINITY);
}

FN double F(total)(vf v) {
    float lane[W];
    double sum = 0;
    F(store)(lane, 0, v, FLOAT32, 0);
    for (int j = 0; j < W; j++) sum += lane[j];
    return sum;
}

FN float F(largest)(vf v) {
    float lane[W], m;
    F(store)(lane, 0, v, FLOAT32, 0);
    m = lane[0];
    for (int j = 1; j < W; j++) m = lane[j] > m ? lane[j] : m;
    return m;
}

FN void F(flush)(F(stats) * s, F(lanes) * a, int moments) {
    for (int j = 0; j < 4; j++) s->sum += F(total)(a->sum[j]);
    for (int j = 0; j < 2 && moments; j++) {
        s->weighted += F(total)(a->weighted[j]);
        s->squared += F(total)(a->squared[j]);
    }
    if (moments) s->top = fmaxf(s->top, F(largest)(a->top));
    F(clear)(a);
}

/* Move the exponent to c, so that everything summed so far is relative to it. */
FN void F(raise)(F(stats) * s, float c) {
    double shift = (double)s->c - c, factor = exp2(shift);
    if (s->sum > 0) {
        s->weighted = factor > 0 ? (s->weighted + shift * s->sum) * factor : 0;
        s->sum *= factor;
        s->squared *= factor * factor;
    }
    s->c = c;
}

FN void F(add_block)(F(stats) * s, F(lanes) * a, const void *x, int64_t i, int dtype, float k, int moments) {
    vf v[8], m;
    for (int j = 0; j < 8; j++) v[j] = F(load)(x, i + j * W, dtype);
    m = vmax(vmax(vmax(v[0], v[1]), vmax(v[2], v[3])), vmax(vmax(v[4], v[5]), vmax(v[6], v[7])));
    if (__builtin_expect(F(any_greater)(m, vset1((s->c + 30.0f) / k)), 0)) {
        F(flush)(s, a, moments);
        F(raise)(s, F(largest)(m) * k);
    }
    if (moments) a->top = vmax(m, a->top);
    for (int j = 0; j < 8; j++) {
        vf t = vfma(v[j], vset1(k), vset1(-s->c)), e = F(exp2)(t);
        a->sum[j & 3] = vadd(a->sum[j & 3], e);
        if (moments) { /* t = -inf carries no weight, but 0 * -inf would be NaN */
            a->weighted[j & 1] = vfma(e, vmax(vset1(-300.0f), t), a->weighted[j & 1]);
            a->squared[j & 1] = vfma(e, e, a->squared[j & 1]);
        }
    }
}

/* The last n < BLOCK elements as float32, padded with -inf. */
FN void F(pad)(float *block, const void *x, int64_t i, int64_t n, int dtype) {
    for (int64_t j = 0; j < BLOCK; j++) block[j] = j < n ? scalar_load(x, i + j, dtype) : -INFINITY;
}

FN F(stats) F(row_sums)(const void *x, int64_t cols, int dtype, float k, int moments) {
    F(stats) s = {-1e38f, 0, 0, 0, -INFINITY};
    F(lanes) a;
    float block[BLOCK];
    int64_t i = 0;
    F(clear)(&a);
    while (i + BLOCK <= cols) {
        int64_t end = i + SEGMENT < cols ? i + SEGMENT : cols;
        for (; i + BLOCK <= end; i += BLOCK) F(add_block)(&s, &a, x, i, dtype, k, moments);
        F(flush)(&s, &a, moments);
    }
    if (i < cols) {
        F(pad)(block, x, i, cols - i, dtype);
        F(add_block)(&s, &a, block, 0, FLOAT32, k, moments);
        F(flush)(&s, &a, moments);
    }
    return s;
}

FN double F(row_logsumexp)(const F(stats) * s, double scale_over_k) {
    if (s->c == INFINITY) return INFINITY;
    return (s->c + log2(s->sum)) * scale_over_k;
}

/* 1. Statistics: log-sum-exp, log-probs of targets, entropy, log sum p^2. */
FN void F(statistics_of)(const row_statistics_args *q, int64_t first, int64_t last, int dtype, int moments) {
    float k = (float)(q->scale * LOG2E);
    double back = q->scale / k; /* so that the rounding of k cancels */
    for (int64_t r = first; r < last; r++) {
        const char *x = (const char *)q->x + r * q->row_bytes;
        F(stats) s = F(row_sums)(x, q->cols, dtype, k, moments);
        double lse = F(row_logsumexp)(&s, back);
        q->logsumexp[r] = lse;
        for (int64_t m = 0; m < q->targets_per_row; m++) {
            int64_t y = q->targets[r * q->targets_per_row + m];
            double z = y < 0 ? 0 : scalar_load(x, y, dtype) * q->scale;
            q->logprob[r * q->targets_per_row + m] = y < 0 ? 0 : (float)(z - lse);
        }
        if (moments) {
            q->entropy[r] = (float)(log(s.sum) - s.weighted / s.sum * back);
            q->log_sum_sq[r] = (float)(log(s.squared) - 2 * log(s.sum));
        }
    }
}

/* 2. Gradient of the raw logits, written over the float32 logits in any dtype: row r begins r * out_row_bytes behind z. */
FN vf F(gradient_of)(vf z, const logit_gradient_args *q, int64_t r, int moments) {
    float high = (float)q->logsumexp[r], low = isinf(high) ? 0 : (float)(q->logsumexp[r] - high);
    vf log_p = vsub(vsub(z, vset1(high)), vset1(low)), p = F(exp2)(vmul(log_p, vset1((float)LOG2E))), d = vset1(q->a[r]);
    if (moments) {
        d = vfma(vmax(vset1(-1e4f), log_p), vset1(q->b[r]), d);
        d = vfma(p, vset1(q->c[r]), d);
    }
    d = vmul(d, p);
    if (q->cap != 0) {
        vf bent = vmul(z, vset1(q->cap));
        d = vmul(d, vsub(vset1(1.0f), vmul(bent, bent)));
    }
    return vmul(d, vset1(q->slope));
}

FN void F(gradient_row)(const logit_gradient_args *q, int64_t r, int dtype, int moments) {
    const float *z = (const float *)((const char *)q->z + r * q->row_bytes);
    void *out = (char *)q->z + r * q->out_row_bytes;
    float block[BLOCK];
    vf d[8];
    int64_t i = 0;
    for (; i + BLOCK <= q->cols; i += BLOCK) { /* a block is read before it is written, and writes stay behind reads */
        for (int j = 0; j < 8; j++) d[j] = F(gradient_of)(F(load)(z, i + j * W, FLOAT32), q, r, moments);
        for (int j = 0; j < 8; j++) F(store)(out, i + j * W, d[j], dtype, 0);
    }
    F(pad)(block, z, i, q->cols - i, FLOAT32);
    for (int j = 0; j < 8; j++) F(store)(block, j * W, F(gradient_of)(F(load)(block, j * W, FLOAT32), q, r, moments), FLOAT32, 0);
    for (int64_t j = 0; i + j < q->cols; j++) scalar_store(out, i + j, block[j], dtype);
}

FN void F(gradient_rows)(const logit_gradient_args *q, int64_t first, int64_t last, int dtype, int moments) {
    int64_t m_count = q->targets_per_row;
    for (int64_t r = first; r < last; r++) {
        const float *z = (const float *)((const char *)q->z + r * q->row_bytes);
        void *out = (char *)q->z + r * q->out_row_bytes;
        const int64_t *y = q->targets + r * m_count;
        double *at_target = q->scratch + r * m_count;
        for (int64_t m = 0; m < m_count; m++) at_target[m] = y[m] < 0 ? 0 : z[y[m]];
        F(gradient_row)(q, r, dtype, moments);
        for (int64_t m = 0; m < m_count; m++) {
            if (y[m] < 0) continue;
            double log_p = at_target[m] - q->logsumexp[r], p = exp(log_p), bent = q->cap == 0 ? 0 : at_target[m] * q->cap;
            double d = p * (q->a[r] + (moments ? q->b[r] * fmax(log_p, -1e4) + q->c[r] * p : 0));
            for (int64_t other = 0; other < m_count; other++)
                if (y[other] == y[m]) d += q->g[r * m_count + other];
            scalar_store(out, y[m], (float)(d * (1 - bent * bent) * q->slope), dtype);
        }
    }
}

/* 3. Softmax and log-softmax: sums, then one read and one write. */
FN vf F(softmax_of)(vf x, int method, float c, float inverse, float high, float low) {
    if (method == LOG_SOFTMAX) return vsub(vsub(x, vset1(high)), vset1(low));
    return vmul(F(exp2)(vfma(x, vset1((float)LOG2E), vset1(-c))), vset1(inverse));
}

FN void F(softmax_row)(const softmax_args *q, int64_t r, int in, int method, int stream) {
    const char *x = (const char *)q->x + r * q->row_bytes;
    float *out = q->out + r * q->cols, block[BLOCK];
    F(stats) s = F(row_sums)(x, q->cols, in, (float)LOG2E, 0);
    double lse = F(row_logsumexp)(&s, 1 / (double)(float)LOG2E);
    float inverse = (float)(1 / s.sum), high = (float)lse, low = (float)(lse - high);
    int64_t i = 0, head = stream ? (int64_t)((64 - ((uintptr_t)out & 63)) & 63) / 4 : 0;
    if (isinf(lse)) low = 0;
    for (int part = 0; part < 2; part++) { /* up to the first aligned element; after the main loop, the rest */
        int64_t n = part == 0 ? (head < q->cols ? head : q->cols) : q->cols - i;
        F(pad)(block, x, i, n, in);
        for (int j = 0; j < 8 && j * W < n; j++)
            F(store)(block, j * W, F(softmax_of)(F(load)(block, j * W, FLOAT32), method, s.c, inverse, high, low), FLOAT32, 0);
        for (int64_t j = 0; j < n; j++) out[i + j] = block[j];
        i += n;
        for (; part == 0 && i + BLOCK <= q->cols; i += BLOCK)
            for (int j = 0; j < 8; j++)
                F(store)(out, i + j * W, F(softmax_of)(F(load)(x, i + j * W, in), method, s.c, inverse, high, low), FLOAT32, stream);
    }
}

/* 4. Softmax over the k largest of a row; a heap of (value, place) with the least element at its root. */
FN int F(less)(const softmax_args *q, int64_t base, int64_t a, int64_t b) {
    float va = q->kept_value[base + a], vb = q->kept_value[base + b];
    return va < vb || (va == vb && q->kept_place[base + a] > q->kept_place[base + b]);
}

FN void F(sift)(const softmax_args *q, int64_t base) {
    for (int64_t at = 0, child; (child = 2 * at + 1) < q->keep; at = child) {
        if (child + 1 < q->keep && F(less)(q, base, child + 1, child)) child++;
        if (!F(less)(q, base, child, at)) return;
        float value = q->kept_value[base + at];
        int64_t place = q->kept_place[base + at];
        q->kept_value[base + at] = q->kept_value[base + child];
        q->kept_place[base + at] = q->kept_place[base + child];
        q->kept_value[base + child] = value;
        q->kept_place[base + child] = place;
    }
}

/* Offer elements i to i + n to the heap; nonzero if one is NaN. */
FN int F(offer)(const softmax_args *q, int64_t base, const void *x, int64_t i, int64_t n, int dtype) {
    for (int64_t j = i; j < i + n; j++) {
        float value = scalar_load(x, j, dtype);
        if (value != value) return 1;
        if (value > q->kept_value[base]) {
            q->kept_value[base] = value;
            q->kept_place[base] = j;
            F(sift)(q, base);
        }
    }
    return 0;
}

FN int F(keep_largest)(const softmax_args *q, int64_t base, const void *x, int dtype) {
    int64_t i = 0;
    int nan = 0;
    for (int64_t j = 0; j < q->keep; j++) { /* places below every real one, so that a row of -inf replaces none of them */
        q->kept_value[base + j] = -INFINITY;
        q->kept_place[base + j] = -1;
    }
    for (; i + W <= q->cols && !nan; i += W)
        if (F(any_above)(F(load)(x, i, dtype), vset1(q->kept_value[base]))) nan = F(offer)(q, base, x, i, W, dtype);
    return nan || F(offer)(q, base, x, i, q->cols - i, dtype);
}

FN void F(sparse_row)(const softmax_args *q, int64_t r, int in) {
    float *out = q->out + r * q->cols;
    int64_t base = r * q->keep;
    int nan = F(keep_largest)(q, base, (const char *)q->x + r * q->row_bytes, in);
    float top = -INFINITY;
    double sum = 0;
    for (int64_t j = 0; j < q->keep; j++) top = fmaxf(top, q->kept_value[base + j]);
    if (nan || isinf(top)) {
        for (int64_t v = 0; v < q->cols; v++) out[v] = NAN;
        return;
    }
    memset(out, 0, (size_t)q->cols * sizeof(float));
    for (int64_t j = 0; j < q->keep; j++) sum += exp((double)q->kept_value[base + j] - top);
    for (int64_t j = 0; j < q->keep; j++)
        if (q->kept_place[base + j] >= 0)
            out[q->kept_place[base + j]] = (float)(exp((double)q->kept_value[base + j] - top) / sum);
}

/* 5. Stablemax. */
FN void F(stablemax_row)(const softmax_args *q, int64_t r, int in) {
    const char *x = (const char *)q->x + r * q->row_bytes;
    float *out = q->out + r * q->cols;
    double sum = 0;
    int64_t i = 0, whole = q->cols - q->cols % W;
    while (i < whole) {
        vf part = vzero();
        int64_t end = i + SEGMENT < whole ? i + SEGMENT : whole;
        for (; i < end; i += W) part = vadd(part, F(stablemax_term)(F(load)(x, i, in)));
        sum += F(total)(part);
    }
    for (; i < q->cols; i++) sum += stablemax_scalar(scalar_load(x, i, in));
    for (i = 0; i < whole; i += W)
        F(store)(out, i, vmul(F(stablemax_term)(F(load)(x, i, in)), vset1((float)(1 / sum))), FLOAT32, 0);
    for (; i < q->cols; i++) out[i] = (float)(stablemax_scalar(scalar_load(x, i, in)) / sum);
}

/* 6. The yardstick of the benchmark: softmax in three passes (maximum, sum, write), otherwise the same code. */
FN void F(three_pass_row)(const softmax_args *q, int64_t r, int in, int stream) {
    const char *x = (const char *)q->x + r * q->row_bytes;
    float *out = q->out + r * q->cols, block[BLOCK];
    F(stats) s = {0};
    F(lanes) a;
    vf m[4] = {vset1(-INFINITY), vset1(-INFINITY), vset1(-INFINITY), vset1(-INFINITY)};
    int64_t whole = q->cols - q->cols % BLOCK;
    F(clear)(&a);
    F(pad)(block, x, whole, q->cols - whole, in);
    for (int64_t i = 0; i < whole; i += BLOCK)
        for (int j = 0; j < 8; j++) m[j & 3] = vmax(F(load)(x, i + j * W, in), m[j & 3]);
    for (int j = 0; j < 8; j++) m[j & 3] = vmax(F(load)(block, j * W, FLOAT32), m[j & 3]);
    s.c = F(largest)(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))) * (float)LOG2E;
    for (int64_t i = 0; i < whole;) {
        int64_t end = i + SEGMENT < whole ? i + SEGMENT : whole;
        for (; i < end; i += BLOCK)
            for (int j = 0; j < 8; j++)
                a.sum[j & 3] = vadd(a.sum[j & 3], F(exp2)(vfma(F(load)(x, i + j * W, in), vset1((float)LOG2E), vset1(-s.c))));
        F(flush)(&s, &a, 0);
    }
    for (int j = 0; j < 8; j++) a.sum[j & 3] = vadd(a.sum[j & 3], F(exp2)(vfma(F(load)(block, j * W, FLOAT32), vset1((float)LOG2E), vset1(-s.c))));
    F(flush)(&s, &a, 0);
    float inverse = (float)(1 / s.sum);
    int aligned = stream && !((uintptr_t)out & 63);
    for (int64_t i = 0; i < whole; i += W) {
        vf p = F(softmax_of)(F(load)(x, i, in), SOFTMAX, s.c, inverse, 0, 0);
        if (aligned) F(store)(out, i, p, FLOAT32, 1);
        else F(store)(out, i, p, FLOAT32, 0);
    }
    for (int j = 0; j < 8; j++)
        F(store)(block, j * W, F(softmax_of)(F(load)(block, j * W, FLOAT32), SOFTMAX, s.c, inverse, 0, 0), FLOAT32, 0);
    memcpy(out + whole, block, (size_t)(q->cols - whole) * sizeof(float));
}

/* Entries: one specialised copy per dtype. */
ENTRY void F(row_statistics)(const void *args, int64_t first, int64_t last) {
    const row_statistics_args *q = args;
    if (q->entropy == NULL) {
        if (q->dtype == FLOAT32) F(statistics_of)(q, first, last, FLOAT32, 0);
        else if (q->dtype == BFLOAT16) F(statistics_of)(q, first, last, BFLOAT16, 0);
        else F(statistics_of)(q, first, last, FLOAT16, 0);
    } else {
        if (q->dtype == FLOAT32) F(statistics_of)(q, first, last, FLOAT32, 1);
        else if (q->dtype == BFLOAT16) F(statistics_of)(q, first, last, BFLOAT16, 1);
        else F(statistics_of)(q, first, last, FLOAT16, 1);
    }
}

ENTRY void F(logit_gradient)(const void *args, int64_t first, int64_t last) {
    const logit_gradient_args *q = args;
    if (q->b == NULL) {
        if (q->dtype == FLOAT32) F(gradient_rows)(q, first, last, FLOAT32, 0);
        else if (q->dtype == BFLOAT16) F(gradient_rows)(q, first, last, BFLOAT16, 0);
        else F(gradient_rows)(q, first, last, FLOAT16, 0);
    } else {
        if (q->dtype == FLOAT32) F(gradient_rows)(q, first, last, FLOAT32, 1);
        else if (q->dtype == BFLOAT16) F(gradient_rows)(q, first, last, BFLOAT16, 1);
        else F(gradient_rows)(q, first, last, FLOAT16, 1);
    }
}

FN void F(softmax_any)(const softmax_args *q, int64_t r, int in) {
    int stream = STREAMS && q->stream;
    if (q->method == SPARSE) F(sparse_row)(q, r, in);
    else if (q->method == STABLEMAX) F(stablemax_row)(q, r, in);
    else if (q->method == LOG_SOFTMAX && stream) F(softmax_row)(q, r, in, LOG_SOFTMAX, 1);
    else if (q->method == LOG_SOFTMAX) F(softmax_row)(q, r, in, LOG_SOFTMAX, 0);
    else if (q->method == THREE_PASS && stream) F(three_pass_row)(q, r, in, 1);
    else if (q->method == THREE_PASS) F(three_pass_row)(q, r, in, 0);
    else if (stream) F(softmax_row)(q, r, in, SOFTMAX, 1);
    else F(softmax_row)(q, r, in, SOFTMAX, 0);
}

ENTRY void F(softmax)(const void *args, int64_t first, int64_t last) {
    const softmax_args *q = args;
    for (int64_t r = first; r < last; r++) {
        if (q->dtype == FLOAT32) F(softmax_any)(q, r, FLOAT32);
        else if (q->dtype == BFLOAT16) F(softmax_any)(q, r, BFLOAT16);
        else F(softmax_any)(q, r, FLOAT16);
    }
}
