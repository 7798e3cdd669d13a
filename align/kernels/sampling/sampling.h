/* One token per row; included once per instruction set after rows/rows.h. sampling/reference.py defines it.
 *
 * Every filter is a threshold on the logit, so nothing is sorted. A lower bound of the threshold leaves few candidates:
 * for top-k the k-th largest of the maxima of groups; for top-p the probability (1 - top_p) / cols, below which all
 * tokens together have less than 1 - top_p. Bisection over the candidates' bits finds the threshold itself.
 */

#undef PART
#define PART (4 * BLOCK)
#define STEPS 4 /* of a bisection before what it has ruled out is removed */

typedef struct {
    float *values, *weights, *pool_values, *pool_weights; /* room for a row and a vector each */
    int32_t *places;
    double *sums;
} F(scratch);

typedef struct { int64_t token, larger; float value; double total; } F(drawn);

/* splitmix64; top 53 bits of it as a number in [0, 1). */
FN uint64_t F(mix)(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

FN double F(uniform)(int64_t seed, int64_t position) {
    return (double)(F(mix)((uint64_t)seed ^ F(mix)((uint64_t)position)) >> 11) * 0x1p-53;
}

/* Bits in the order of the floats, and back. */
FN uint32_t F(key_of)(float x) {
    uint32_t bits = ((float_bits){.value = x}).bits;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

FN float F(value_of)(uint32_t key) { return ((float_bits){.bits = key >> 31 ? key & 0x7fffffffu : ~key}).value; }

/* W elements from i on, -inf beyond the n-th. */
FN vf F(load_up_to)(const void *x, int64_t i, int64_t n, int dtype) {
    float lane[W];
    if (__builtin_expect(i + W <= n, 1)) return F(load)(x, i, dtype);
    for (int64_t j = 0; j < W; j++) lane[j] = i + j < n ? scalar_load(x, i + j, dtype) : -INFINITY;
    return F(load)(lane, 0, FLOAT32);
}

FN int64_t F(count_above)(const void *x, int64_t n, int dtype, float bound) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) count += F(count_greater)(F(load_up_to)(x, i, n, dtype), vset1(bound));
    return count;
}

/* The weights of the values greater than `bound`, 1 each where `weights` is NULL. */
FN double F(weight_above)(const float *values, const float *weights, int64_t n, float bound) {
    double sum = 0;
    if (weights == NULL) return (double)F(count_above)(values, n, FLOAT32, bound);
    for (int64_t i = 0; i < n;) {
        vf part[4] = {vzero(), vzero(), vzero(), vzero()};
        for (int64_t end = i + PART < n ? i + PART : n; i < end; i += 4 * W)
            for (int j = 0; j < 4; j++) {
                vf v = F(load_up_to)(values, i + j * W, n, FLOAT32), w = F(load)(weights, i + j * W, FLOAT32);
                part[j] = vadd(part[j], F(where_greater)(v, vset1(bound), w));
            }
        sum += F(total)(vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
    }
    return sum;
}

/* The elements between two bounds, in their order; `own` (or their places, if NULL) goes with them. */
FN int64_t F(collect)(const void *x, const void *own, int64_t n, int dtype, float least, float most, float *to, void *own_to) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W)
        count += F(pack)(to + count, (int32_t *)own_to + count, F(load_up_to)(x, i, n, dtype), own, i, vset1(least), vset1(most));
    return count;
}

/* Weights 2^((x - top) inverse), followed by zeros up to 4 W, and their sums over stretches of PART; returns their total. */
FN double F(weigh)(const void *x, int64_t n, int dtype, float top, float inverse, const F(scratch) * h) {
    double total = 0;
    for (int64_t i = 0, p = 0; i < n; p++) {
        vf part[4] = {vzero(), vzero(), vzero(), vzero()};
        for (int64_t end = i + PART < n ? i + PART : n; i < end; i += 4 * W)
            for (int j = 0; j < 4; j++) {
                vf e = F(exp2)(vmul(vsub(F(load_up_to)(x, i + j * W, n, dtype), vset1(top)), vset1(inverse)));
                F(store)(h->weights, i + j * W, e, FLOAT32, 0);
                part[j] = vadd(part[j], e);
            }
        h->sums[p] = F(total)(vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
        total += h->sums[p];
    }
    return total;
}

/* Where the running sum of what `weigh` wrote first exceeds `goal`; rounding cannot lead past the last weight. */
FN int64_t F(place_of)(int64_t n, double goal, const F(scratch) * h) {
    double before = 0, past;
    int64_t p = -1, at = -1;
    for (int64_t i = 0, j = 0; i < n; i += PART, j++) {
        if (h->sums[j] <= 0) continue;
        if (p >= 0) before += h->sums[p];
        p = j;
        if (before + h->sums[j] > goal) break;
    }
    past = before;
    for (int64_t i = p * PART; i < n && i < (p + 1) * PART && past <= goal; i++) {
        past += h->weights[i];
        if (h->weights[i] > 0) at = i;
    }
    return at;
}

/* The smallest value with less than `goal` of the weight above it; all of them lie between `least` and `top`. */
FN float F(threshold)(const float *values, const float *weights, int64_t n, double goal, float least, float top, const F(scratch) * h) {
    uint32_t lo = F(key_of)(least) - 1, hi = F(key_of)(top); /* enough weight above the one, not above the other */
    double removed = 0, above_hi = 0;
    for (int step = 1; lo + 1 < hi; step++) {
        uint32_t middle = lo + (hi - lo) / 2;
        double above = removed + F(weight_above)(values, weights, n, F(value_of)(middle));
        if (above >= goal) lo = middle;
        else hi = middle, above_hi = above;
        if (step % STEPS == 0) {
            n = F(collect)(values, weights, n, FLOAT32, F(value_of)(lo + 1), F(value_of)(hi), h->pool_values, h->pool_weights);
            values = h->pool_values;
            weights = weights ? h->pool_weights : NULL;
            removed = above_hi;
        }
    }
    return F(value_of)(hi);
}

/* The smallest float that min-p keeps, compared as the definition does in float64. */
FN float F(least_by_min_p)(float top, double heat, double min_p) {
    double limit = top / heat + log(min_p);
    float least = (float)(limit * heat);
    while (least / heat < limit) least = nextafterf(least, INFINITY);
    while (nextafterf(least, -INFINITY) / heat >= limit) least = nextafterf(least, -INFINITY);
    return least;
}

/* A value that at least k elements reach: the k-th largest of the maxima of as large groups as leave several times k. */
FN float F(least_by_top_k)(const void *x, int64_t n, int dtype, int64_t k, float top, const F(scratch) * h) {
    int64_t left = n, groups;
    const void *from = x;
    do {
        groups = 0;
        for (int64_t i = 0; i < left; i += BLOCK, groups += W) {
            vf m = vset1(-INFINITY);
            for (int j = 0; j < 8; j++)
                m = vmax(from == x ? F(load_up_to)(x, i + j * W, left, dtype) : F(load_up_to)(from, i + j * W, left, FLOAT32), m);
            F(store)(h->pool_values, groups, m, FLOAT32, 0);
        }
        from = h->pool_values, left = groups;
    } while (groups >= 32 * k);
    if (F(count_above)(from, groups, FLOAT32, -INFINITY) < k) return -FLT_MAX;
    return F(threshold)(from, NULL, groups, (double)k, -FLT_MAX, top, h);
}

/* The tokens that may be drawn, in order: their logits into h->values, their ids into h->places. `least`: by min-p. */
FN int64_t F(filter)(const sample_args *q, int64_t r, const void *x, int dtype, float top, float inverse, float least, const F(scratch) * h) {
    int64_t k = q->temperature[r] > 0 ? q->top_k[r] : 0, n = q->cols;
    double p = q->temperature[r] > 0 ? q->top_p[r] : 1, total = 0;
    if (k > 0 && k < n) least = fmaxf(least, F(least_by_top_k)(x, n, dtype, k, top, h));
    else if (p < 1 && least == -FLT_MAX) {
        total = F(weigh)(x, n, dtype, top, inverse, h);
        least = (float)(top + q->temperature[r] * log(fmin(1 - p, 1) * total / (double)n * 0.999));
        least = fmaxf(nextafterf(least, -INFINITY), -FLT_MAX);
    }
    n = F(collect)(x, NULL, n, dtype, least, INFINITY, h->values, h->places);
    if (k > 0 && k < n) {
        least = F(threshold)(h->values, NULL, n, (double)k, least, top, h);
        n = F(collect)(h->values, h->places, n, FLOAT32, least, INFINITY, h->values, h->places);
    }
    if (p < 1) {
        double left = F(weigh)(h->values, n, FLOAT32, top, inverse, h);
        least = F(threshold)(h->values, h->weights, n, p * (total > 0 ? total : left), least, top, h);
        n = F(collect)(h->values, h->places, n, FLOAT32, least, INFINITY, h->values, h->places);
    }
    return n;
}

/* One of n elements by inverse CDF; ids are their places where `places` is NULL. */
FN F(drawn) F(draw)(const void *x, const int32_t *places, int64_t n, int dtype, float top, float inverse, double u, const F(scratch) * h) {
    double total = F(weigh)(x, n, dtype, top, inverse, h);
    int64_t at = F(place_of)(n, u * total, h);
    float value = scalar_load(x, at, dtype);
    return (F(drawn)){places ? places[at] : at, F(count_above)(x, n, dtype, value), value, total};
}

FN void F(sample_row)(const sample_args *q, int64_t r, int dtype, const F(scratch) * h) {
    const char *x = (const char *)q->logits + r * q->row_bytes;
    double heat = q->temperature[r], back = 1 / (double)(float)LOG2E;
    F(stats) s = F(row_sums)(x, q->cols, dtype, (float)LOG2E, 1);
    int proper = s.sum > 0 && s.top < INFINITY; /* neither all -inf nor NaN or +inf anywhere */
    float inverse = heat > 0 ? (float)fmin(fmax(LOG2E / heat, FLT_MIN), FLT_MAX) : 1, least = heat > 0 ? -FLT_MAX : s.top;
    F(drawn) d = {0, 0, scalar_load(x, 0, dtype), NAN};
    int64_t n = 0;
    if (proper && heat > 0 && q->min_p[r] > 0) least = F(least_by_min_p)(s.top, heat, q->min_p[r]);
    int filtered = least > -FLT_MAX || (q->top_k[r] > 0 && q->top_k[r] < q->cols) || q->top_p[r] < 1;
    if (proper && filtered) n = F(filter)(q, r, x, dtype, s.top, inverse, least, h);
    double u = heat > 0 ? F(uniform)(q->seed[r], q->position[r]) : 0;
    if (n > 0) d = F(draw)(h->values, h->places, n, FLOAT32, s.top, inverse, u, h);
    else if (proper && !filtered) d = F(draw)(x, NULL, q->cols, dtype, s.top, inverse, u, h);
    else d.larger = F(count_above)(x, q->cols, dtype, d.value);
    q->token[r] = d.token;
    q->rank[r] = d.larger + 1;
    q->raw[r] = proper ? (float)(d.value - F(row_logsumexp)(&s, back)) : NAN;
    q->processed[r] = heat > 0 ? (float)(((double)d.value - s.top) / heat - log(d.total)) : 0;
    q->entropy[r] = proper ? (float)(log(s.sum) - s.weighted / s.sum * back) : NAN;
}

ENTRY void F(sample)(const void *args, int64_t first, int64_t last) {
    const sample_args *q = args;
    size_t room = (size_t)q->cols + BLOCK;
    float *memory = malloc(room * 5 * sizeof(float) + room / PART * sizeof(double) + sizeof(double));
    if (memory == NULL) {
        *q->failed = 1;
        return;
    }
    F(scratch) h = {memory, memory + room, memory + 2 * room, memory + 3 * room, (int32_t *)(memory + 4 * room), NULL};
    h.sums = (double *)(memory + 5 * room + (5 * room & 1));
    for (int64_t r = first; r < last; r++) {
        if (q->dtype == FLOAT32) F(sample_row)(q, r, FLOAT32, &h);
        else if (q->dtype == BFLOAT16) F(sample_row)(q, r, BFLOAT16, &h);
        else F(sample_row)(q, r, FLOAT16, &h);
    }
    free(memory);
}
