/* One vector vocabulary for every instruction set; included once per set, with ISA naming it.
 *
 * vf: W floats. Loads take any of the three dtypes and give float32. FN marks functions that may use the set.
 * pack: writes the elements between two bounds, and 4 bytes of each one's own (its place i, i + 1, ... if `own` is NULL),
 * without gaps; returns how many. A whole vector may be written; the target may lie before the source, or be it.
 */
#undef F
#undef FN
#undef ENTRY
#undef STREAMS
#undef W
#undef vf
#undef vset1
#undef vadd
#undef vsub
#undef vmul
#undef vdiv
#undef vmax
#undef vmin
#undef vfma
#undef vzero
#undef P0
#undef P1
#undef P2
#undef P3
#undef P4
#undef P5
#undef CONCAT
#undef CONCAT_

#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define F(name) CONCAT(name, ISA)

/* 2^r on [0, 1), relative error 7.5e-8 (minimax, degree 5). */
#define P0 9.9999992506e-01f
#define P1 6.9315307320e-01f
#define P2 2.4015361706e-01f
#define P3 5.5826317993e-02f
#define P4 8.9893401625e-03f
#define P5 1.8775766454e-03f

#if ISA_LEVEL == 2 /* AVX-512 */

#define W 16
#define vf __m512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define ENTRY static __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define STREAMS 1
#define vset1 _mm512_set1_ps
#define vadd _mm512_add_ps
#define vsub _mm512_sub_ps
#define vmul _mm512_mul_ps
#define vdiv _mm512_div_ps
#define vmax _mm512_max_ps
#define vmin _mm512_min_ps
#define vfma _mm512_fmadd_ps
#define vzero _mm512_setzero_ps

FN int F(any_greater)(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
FN int F(any_above)(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ) != 0; } /* or NaN */

FN vf F(exp2)(vf t) {
    vf r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
    vf p = vfma(vfma(vfma(vfma(vfma(vset1(P5), r, vset1(P4)), r, vset1(P3)), r, vset1(P2)), r, vset1(P1)), r, vset1(P0));
    return _mm512_scalef_ps(p, t);
}

FN vf F(load)(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)p + i);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i));
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

FN __m256i F(to_bfloat16)(vf y) {
    __m512i bits = _mm512_castps_si512(y);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

FN void F(store)(void *p, int64_t i, vf y, int dtype, int stream) {
    if (dtype == FLOAT32) {
        if (stream) _mm512_stream_ps((float *)p + i, y);
        else _mm512_storeu_ps((float *)p + i, y);
        return;
    }
    __m256i half = dtype == FLOAT16 ? _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : F(to_bfloat16)(y);
    __m256i *at = (__m256i *)((uint16_t *)p + i);
    if (stream) _mm256_stream_si256(at, half);
    else _mm256_storeu_si256(at, half);
}

FN vf F(stablemax_term)(vf x) {
    vf one = vset1(1.0f), below = _mm512_div_ps(one, vsub(one, vmin(vzero(), x)));
    return _mm512_mask_mov_ps(below, _mm512_cmp_ps_mask(x, vzero(), _CMP_GE_OQ), vadd(one, x));
}

FN int F(count_greater)(vf a, vf b) { return __builtin_popcount(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)); }
FN vf F(where_greater)(vf a, vf b, vf y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y); }

FN int F(pack)(float *to, void *own_to, vf v, const void *own, int64_t i, vf least, vf most) {
    __mmask16 kept = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, least, _CMP_GE_OQ), v, most, _CMP_LE_OQ);
    if (kept == 0) return 0;
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i mine = own ? _mm512_loadu_si512((const int32_t *)own + i) : _mm512_add_epi32(lanes, _mm512_set1_epi32((int)i));
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, v));
    _mm512_storeu_si512(own_to, _mm512_maskz_compress_epi32(kept, mine));
    return __builtin_popcount(kept);
}

#elif ISA_LEVEL == 1 /* AVX2 */

#define W 8
#define vf __m256
#define FN static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define ENTRY static __attribute__((target("avx2,fma,f16c")))
#define STREAMS 1
#define vset1 _mm256_set1_ps
#define vadd _mm256_add_ps
#define vsub _mm256_sub_ps
#define vmul _mm256_mul_ps
#define vdiv _mm256_div_ps
#define vmax _mm256_max_ps
#define vmin _mm256_min_ps
#define vfma _mm256_fmadd_ps
#define vzero _mm256_setzero_ps

FN int F(any_greater)(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
FN int F(any_above)(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)) != 0; } /* or NaN */

FN vf F(exp2)(vf t) {
    vf normal = _mm256_cmp_ps(t, vset1(-126.0f), _CMP_NLT_UQ); /* true for NaN, which must stay */
    vf n = _mm256_floor_ps(_mm256_max_ps(vset1(-126.0f), t));
    vf r = vsub(_mm256_max_ps(vset1(-126.0f), t), n);
    vf p = vfma(vfma(vfma(vfma(vfma(vset1(P5), r, vset1(P4)), r, vset1(P3)), r, vset1(P2)), r, vset1(P1)), r, vset1(P0));
    __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(normal, vmul(p, _mm256_castsi256_ps(scale)));
}

FN vf F(load)(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)p + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

FN __m128i F(to_bfloat16)(vf y) {
    __m256i bits = _mm256_castps_si256(y);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    return _mm256_castsi256_si128(packed);
}

FN void F(store)(void *p, int64_t i, vf y, int dtype, int stream) {
    if (dtype == FLOAT32) {
        if (stream) _mm256_stream_ps((float *)p + i, y);
        else _mm256_storeu_ps((float *)p + i, y);
        return;
    }
    __m128i half = dtype == FLOAT16 ? _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT) : F(to_bfloat16)(y);
    __m128i *at = (__m128i *)((uint16_t *)p + i);
    if (stream) _mm_stream_si128(at, half);
    else _mm_storeu_si128(at, half);
}

FN vf F(stablemax_term)(vf x) {
    vf one = vset1(1.0f), below = vdiv(one, vsub(one, vmin(vzero(), x)));
    return _mm256_blendv_ps(below, vadd(one, x), _mm256_cmp_ps(x, vzero(), _CMP_GE_OQ));
}

FN int F(count_greater)(vf a, vf b) { return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
FN vf F(where_greater)(vf a, vf b, vf y) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), y); }

FN int F(pack)(float *to, void *own_to, vf v, const void *own, int64_t i, vf least, vf most) {
    float lane[W];
    int count = 0;
    vf within = _mm256_and_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ), _mm256_cmp_ps(v, most, _CMP_LE_OQ));
    int kept = _mm256_movemask_ps(within);
    if (kept == 0) return 0;
    _mm256_storeu_ps(lane, v);
    for (; kept; kept &= kept - 1, count++) {
        int j = __builtin_ctz(kept);
        int32_t place = (int32_t)i + j;
        to[count] = lane[j];
        memcpy((int32_t *)own_to + count, own ? (const int32_t *)own + i + j : &place, 4);
    }
    return count;
}

#elif ISA_LEVEL == 3 /* NEON, which every 64-bit Arm has */

#define W 4
#define vf float32x4_t
#define FN static inline __attribute__((always_inline))
#define ENTRY static
#define STREAMS 0
#define vset1 vdupq_n_f32
#define vadd vaddq_f32
#define vsub vsubq_f32
#define vmul vmulq_f32
#define vdiv vdivq_f32
#define vmax vmaxq_f32
#define vmin vminq_f32
#define vfma(a, b, c) vfmaq_f32(c, a, b)
#define vzero() vdupq_n_f32(0.0f)

FN int F(any_greater)(vf a, vf b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }
FN int F(any_above)(vf a, vf b) { return vminvq_u32(vcleq_f32(a, b)) == 0; } /* or NaN */

FN vf F(exp2)(vf t) {
    vf held = vmax(vset1(-126.0f), t), n = vrndmq_f32(held), r = vsub(held, n);
    vf p = vfma(vfma(vfma(vfma(vfma(vset1(P5), r, vset1(P4)), r, vset1(P3)), r, vset1(P2)), r, vset1(P1)), r, vset1(P0));
    int32x4_t scale = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    vf y = vmul(p, vreinterpretq_f32_s32(scale));
    return vbslq_f32(vcltq_f32(t, vset1(-126.0f)), vzero(), y); /* NaN stays */
}

FN vf F(load)(const void *p, int64_t i, int dtype) {
    if (dtype == FLOAT32) return vld1q_f32((const float *)p + i);
    uint16x4_t half = vld1_u16((const uint16_t *)p + i);
    if (dtype == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(half), 16));
}

FN uint16x4_t F(to_bfloat16)(vf y) {
    uint32x4_t bits = vreinterpretq_u32_f32(y), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(y, y), rounded, vdupq_n_u32(0x7fc00000)), 16);
}

FN void F(store)(void *p, int64_t i, vf y, int dtype, int stream) {
    (void)stream;
    if (dtype == FLOAT32) vst1q_f32((float *)p + i, y);
    else vst1_u16((uint16_t *)p + i, dtype == FLOAT16 ? vreinterpret_u16_f16(vcvt_f16_f32(y)) : F(to_bfloat16)(y));
}

FN vf F(stablemax_term)(vf x) {
    vf one = vset1(1.0f), below = vdiv(one, vsub(one, vmin(vzero(), x)));
    return vbslq_f32(vcgeq_f32(x, vzero()), vadd(one, x), below);
}

FN int F(count_greater)(vf a, vf b) { return (int)vaddvq_u32(vshrq_n_u32(vcgtq_f32(a, b), 31)); }
FN vf F(where_greater)(vf a, vf b, vf y) { return vbslq_f32(vcgtq_f32(a, b), y, vzero()); }

FN int F(pack)(float *to, void *own_to, vf v, const void *own, int64_t i, vf least, vf most) {
    uint32x4_t within = vandq_u32(vcgeq_f32(v, least), vcleq_f32(v, most));
    float lane[W];
    uint32_t kept[W];
    int count = 0;
    if (vmaxvq_u32(within) == 0) return 0;
    vst1q_f32(lane, v);
    vst1q_u32(kept, within);
    for (int j = 0; j < W; j++) {
        int32_t place = (int32_t)i + j;
        if (!kept[j]) continue;
        to[count] = lane[j];
        memcpy((int32_t *)own_to + count, own ? (const int32_t *)own + i + j : &place, 4);
        count++;
    }
    return count;
}

#else /* portable C */

#define W 1
#define vf float
#define FN static inline
#define ENTRY static
#define STREAMS 0
#define vset1(x) ((float)(x))
#define vadd(a, b) ((a) + (b))
#define vsub(a, b) ((a) - (b))
#define vmul(a, b) ((a) * (b))
#define vdiv(a, b) ((a) / (b))
#define vmax(a, b) ((a) > (b) ? (a) : (b))
#define vmin(a, b) ((a) < (b) ? (a) : (b))
#define vfma(a, b, c) ((float)((double)(a) * (b) + (c)))
#define vzero() 0.0f

FN int F(any_greater)(vf a, vf b) { return a > b; }
FN int F(any_above)(vf a, vf b) { return !(a <= b); } /* or NaN */

FN vf F(exp2)(vf t) {
    if (!(t >= -126.0f)) return t != t ? t : 0.0f;
    int n = (int)t;
    n -= t < (float)n; /* floor, without a call */
    float r = t - (float)n;
    float p = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + P0;
    union { uint32_t bits; float value; } scale = {(uint32_t)(n + 127) << 23};
    return p * scale.value;
}

FN vf F(load)(const void *p, int64_t i, int dtype) { return scalar_load(p, i, dtype); }
FN void F(store)(void *p, int64_t i, vf y, int dtype, int stream) {
    (void)stream;
    scalar_store(p, i, y, dtype);
}
FN vf F(stablemax_term)(vf x) { return x >= 0 ? 1 + x : 1 / (1 - x); }
FN int F(count_greater)(vf a, vf b) { return a > b; }
FN vf F(where_greater)(vf a, vf b, vf y) { return a > b ? y : 0; }

FN int F(pack)(float *to, void *own_to, vf v, const void *own, int64_t i, vf least, vf most) {
    if (!(v >= least && v <= most)) return 0;
    int32_t place = (int32_t)i;
    *to = v;
    memcpy(own_to, own ? (const int32_t *)own + i : &place, 4);
    return 1;
}

#endif
