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
    double *sums;
    float *values, *weights, *pool_values, *pool_weights; /* room for a row and a block each */
    int32_t *places;
    float top, least, inverse; /* of the present row: largest logit, a bound of what is kept, log2(e) / temperature */
} F(work);

typedef struct { int64_t token; float value; double total; } F(drawn);

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

/* Copies the elements from `least` to `most`, with each its 4 bytes of `own` (its place if NULL); returns how many. */
FN int64_t F(collect)(const void *x, const void *own, int64_t n, int dtype, float least, float most, float *to,
                      void *own_to) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += W) {
        vf v = F(load_up_to)(x, i, n, dtype);
        count += F(pack)(to + count, (int32_t *)own_to + count, v, own, i, vset1(least), vset1(most));
    }
    return count;
}

/* Weights 2^((x - top) inverse), zeros after them up to 4 W, and the sums of stretches of PART; returns their total. */
FN double F(weigh)(const void *x, int64_t n, int dtype, const F(work) * h) {
    double total = 0;
    for (int64_t i = 0, p = 0; i < n; p++) {
        vf part[4] = {vzero(), vzero(), vzero(), vzero()};
        for (int64_t end = i + PART < n ? i + PART : n; i < end; i += 4 * W)
            for (int j = 0; j < 4; j++) {
                vf below = vsub(F(load_up_to)(x, i + j * W, n, dtype), vset1(h->top));
                vf e = F(exp2)(vmul(below, vset1(h->inverse)));
                F(store)(h->weights, i + j * W, e, FLOAT32, 0);
                part[j] = vadd(part[j], e);
            }
        h->sums[p] = F(total)(vadd(vadd(part[0], part[1]), vadd(part[2], part[3])));
        total += h->sums[p];
    }
    return total;
}

/* Where the running sum of what `weigh` wrote first exceeds `goal`; rounding cannot lead past the last weight. */
FN int64_t F(place_of)(int64_t n, double goal, const F(work) * h) {
    double before = 0;
    int64_t p = -1, at = -1;
    for (int64_t next = 0; next * PART < n; next++) {
        if (h->sums[next] <= 0) continue;
        if (p >= 0) before += h->sums[p];
        p = next;
        if (before + h->sums[p] > goal) break;
    }
    for (int64_t i = p * PART; i < n && i < (p + 1) * PART && before <= goal; i++) {
        before += h->weights[i];
        if (h->weights[i] > 0) at = i;
    }
    return at;
}

/* The smallest value with less than `goal` of the weight above it; they lie between `least` and the largest logit. */
ENTRY float F(threshold)(const float *values, const float *weights, int64_t n, double goal, float least,
                         const F(work) * h) {
    uint32_t lo = F(key_of)(least) - 1, hi = F(key_of)(h->top); /* enough weight above the one, not above the other */
    double removed = 0, above_hi = 0;
    for (int step = 1; lo + 1 < hi; step++) {
        uint32_t middle = lo + (hi - lo) / 2;
        double above = removed + F(weight_above)(values, weights, n, F(value_of)(middle));
        if (above >= goal) lo = middle;
        else hi = middle, above_hi = above;
        if (step % STEPS) continue;
        float from = F(value_of)(lo + 1), to = F(value_of)(hi);
        n = F(collect)(values, weights, n, FLOAT32, from, to, h->pool_values, h->pool_weights);
        if (n == 1) return *h->pool_values;
        values = h->pool_values;
        weights = weights ? h->pool_weights : NULL;
        removed = above_hi;
    }
    return F(value_of)(hi);
}

/* The smallest float that min-p keeps, compared as the definition does in float64. */
FN float F(least_by_min_p)(float top, double heat, double min_p) {
    double limit = top / heat + log(min_p);
    float least = (float)(limit * heat);
    return least / heat < limit ? nextafterf(least, INFINITY) : least;
}

/* The maxima of groups of 8 (one in each vector of a block); returns how many. */
FN int64_t F(group_maxima)(const void *x, int64_t n, int dtype, float *to) {
    int64_t groups = 0;
    for (int64_t i = 0; i < n; i += BLOCK, groups += W) {
        vf m = vset1(-INFINITY);
        for (int j = 0; j < 8; j++) m = vmax(F(load_up_to)(x, i + j * W, n, dtype), m);
        F(store)(to, groups, m, FLOAT32, 0);
    }
    return groups;
}

/* A value that at least k elements reach: the k-th largest maximum of groups, as few as leave several times k. */
FN float F(least_by_top_k)(const void *x, int64_t n, int dtype, int64_t k, const F(work) * h) {
    int64_t groups = F(group_maxima)(x, n, dtype, h->pool_values);
    while (groups >= 32 * k) groups = F(group_maxima)(h->pool_values, groups, FLOAT32, h->pool_values);
    if (F(count_above)(h->pool_values, groups, FLOAT32, -INFINITY) < k) return -FLT_MAX;
    return F(threshold)(h->pool_values, NULL, groups, (double)k, -FLT_MAX, h);
}

/* Of n tokens those that reach h->least. */
ENTRY int64_t F(narrow)(int64_t n, const F(work) * h) {
    return F(collect)(h->values, h->places, n, FLOAT32, h->least, INFINITY, h->values, h->places);
}

/* The tokens that may be drawn, in order: logits into h->values, ids into h->places. Begins with the bound h->least. */
FN int64_t F(filter)(const void *x, int64_t n, int dtype, double heat, int64_t k, double p, double lse, F(work) * h) {
    double total = 0;
    if (k > 0 && k < n) h->least = fmaxf(h->least, F(least_by_top_k)(x, n, dtype, k, h));
    else if (p < 1 && h->least == -FLT_MAX) {
        total = heat == 1 ? exp(lse - h->top) : F(weigh)(x, n, dtype, h);
        float least = (float)(h->top + heat * log(fmin(1 - p, 1) * total / (double)n * 0.999)); /* less, for rounding */
        h->least = fmaxf(nextafterf(least, -INFINITY), -FLT_MAX);
    }
    n = F(collect)(x, NULL, n, dtype, h->least, INFINITY, h->values, h->places);
    if (k > 0 && k < n) {
        h->least = F(threshold)(h->values, NULL, n, (double)k, h->least, h);
        n = F(narrow)(n, h);
    }
    if (p < 1) {
        double left = F(weigh)(h->values, n, FLOAT32, h);
        h->least = F(threshold)(h->values, h->weights, n, p * (total > 0 ? total : left), h->least, h);
        n = F(narrow)(n, h);
    }
    return n;
}

/* One of n elements by inverse CDF; ids are their places where `places` is NULL. */
FN F(drawn) F(draw)(const void *x, const int32_t *places, int64_t n, int dtype, double u, const F(work) * h) {
    double total = F(weigh)(x, n, dtype, h);
    int64_t at = F(place_of)(n, u * total, h);
    return (F(drawn)){places ? places[at] : at, scalar_load(x, at, dtype), total};
}

FN void F(sample_row)(const sample_args *q, int64_t r, int dtype, F(work) * h) {
    const char *x = (const char *)q->logits + r * q->row_bytes;
    int64_t cols = q->cols, k = q->top_k[r], n = 0;
    F(stats) s = F(row_sums)(x, cols, dtype, (float)LOG2E, 1);
    double heat = q->temperature[r], p = q->top_p[r], u = 0, back = 1 / (double)(float)LOG2E;
    double lse = F(row_logsumexp)(&s, back);
    F(drawn) d = {0, scalar_load(x, 0, dtype), NAN};
    int valid = heat >= 0 && heat < INFINITY && k >= 0 && p > 0 && p <= 1 && q->min_p[r] >= 0 && q->min_p[r] <= 1;
    int proper = valid && s.sum > 0 && s.top < INFINITY; /* neither -inf everywhere nor NaN or +inf anywhere */
    h->top = h->least = s.top, h->inverse = 1; /* at temperature 0 the largest stay, all of one weight */
    if (heat > 0) {
        h->least = proper && q->min_p[r] > 0 ? F(least_by_min_p)(s.top, heat, q->min_p[r]) : -FLT_MAX;
        h->inverse = (float)fmin(fmax(LOG2E / heat, FLT_MIN), FLT_MAX);
        u = F(uniform)(q->seed[r], q->position[r]);
    } else k = 0, p = 1;
    int filtered = h->least > -FLT_MAX || (k > 0 && k < cols) || p < 1;
    if (proper && filtered) n = F(filter)(x, cols, dtype, heat, k, p, lse, h);
    if (n > 0) d = F(draw)(h->values, h->places, n, FLOAT32, u, h);
    else if (proper && !filtered) d = F(draw)(x, NULL, cols, dtype, u, h);
    if (q->rank && n > 0) q->rank[r] = 1 + F(count_above)(h->values, n, FLOAT32, d.value);
    else if (q->rank) q->rank[r] = 1 + F(count_above)(x, cols, dtype, d.value);
    q->token[r] = d.token;
    q->raw[r] = proper ? (float)(d.value - lse) : NAN;
    q->processed[r] = heat > 0 ? (float)(((double)d.value - s.top) / heat - log(d.total)) : 0;
    q->entropy[r] = proper ? (float)(log(s.sum) - s.weighted / s.sum * back) : NAN;
}

ENTRY void F(sample)(const void *args, int64_t first, int64_t last) {
    const sample_args *q = args;
    size_t room = (size_t)q->cols + BLOCK, parts = room / PART + 1;
    double *sums = malloc(parts * sizeof(double) + 5 * room * sizeof(float));
    float *rows = (float *)(sums + parts);
    if (sums == NULL) {
        *q->failed = 1;
        return;
    }
    F(work) h = {sums, rows, rows + room, rows + 2 * room, rows + 3 * room, (int32_t *)(rows + 4 * room), 0, 0, 0};
    for (int64_t r = first; r < last; r++) {
        if (q->dtype == FLOAT32) F(sample_row)(q, r, FLOAT32, &h);
        else if (q->dtype == BFLOAT16) F(sample_row)(q, r, BFLOAT16, &h);
        else F(sample_row)(q, r, FLOAT16, &h);
    }
    free(sums);
}
