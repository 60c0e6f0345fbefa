/* Attention of a piece of a prompt over the paged cache: in bf16 in tiles of queries, in fp32 a few queries at a time. */
#include "prompts.h"
#include "weigh.h"
#include "wide.h"

/* 2^x for x <= 0 to 3e-6 of itself, which is far below what bf16 keeps; below -126 next to nothing. A NaN stays one. */
static inline __m512 power(__m512 given) {
    __m512 x = _mm512_max_ps(_mm512_set1_ps(-126.0f), given); /* in this order */
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.58285e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.590643e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024099e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9312419e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), n);
}

/* As weigh, to weights in bf16 beside the scores, of which `num`, a multiple of 32, are read. */
static float weigh_narrow(const float *s, long open, long num, float scale, bf16 *w) {
    __m512 by = _mm512_set1_ps(scale * 1.44269504f), most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long i = 0; i < open; i += 16) most = _mm512_mask_max_ps(most, lanes(open - i), most, _mm512_loadu_ps(s + i));
    __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), by);
    for (long i = 0; i < num; i += 32) {
        __mmask16 low = i < open ? lanes(open - i) : 0, high = i + 16 < open ? lanes(open - i - 16) : 0;
        __m512 a = _mm512_maskz_mov_ps(low, power(_mm512_fmsub_ps(_mm512_loadu_ps(s + i), by, top)));
        __m512 b = _mm512_maskz_mov_ps(high, power(_mm512_fmsub_ps(_mm512_loadu_ps(s + i + 16), by, top)));
        _mm512_storeu_si512(w + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        sum = _mm512_add_ps(_mm512_add_ps(sum, a), b);
    }
    return _mm512_reduce_add_ps(sum);
}

enum { QUERIES = 32, APART = 32 }; /* rows of scores a power of two apart would share few lines of a cache */

/* A head's keys and values of one context, from their blocks into tiles; zeros up to whole tiles of 32 tokens.
 * Keys [C / 16][D / 32][16][16][2] (pairs of D by token), values [C / 32][D / 16][16][16][2] (pairs of tokens by D). */
static void lay_out(const step *s, const int32_t *table, long h, long context, const bf16 *keys, const bf16 *values, bf16 *k, bf16 *v) {
    long dim = s->dim, block = s->heads * s->size, up = (context + 31) / 32 * 32;
    memset(k, 0, up * dim * 2);
    memset(v, 0, up * dim * 2);
    for (long c = 0; c < context; c++) {
        long from = (table[c / s->size] * block + h * s->size + c % s->size) * dim;
        const uint32_t *pairs = (const uint32_t *)(keys + from);
        uint32_t *to = (uint32_t *)k + (c / 16) * (dim / 32) * 256 + c % 16;
        for (long d = 0; d < dim / 2; d++) to[d * 16] = pairs[d];
        bf16 *w = v + (c / 32) * (dim / 16) * 512 + (c % 32 / 2) * 32;
        for (long d = 0; d < dim; d += 16, w += 512) {
            __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values + from + d)));
            _mm512_storeu_si512(w, c % 2 ? _mm512_or_si512(_mm512_loadu_si512(w), _mm512_slli_epi32(x, 16)) : x);
        }
    }
}

/* Sums [32][32] in tiles 0-3. */
INLINE void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Left factors [32][32], rows `apart` numbers from each other, by two tiles of right ones. */
INLINE void add_products(const bf16 *left, long apart, const bf16 *first, const bf16 *second) {
    _tile_loadd(4, left, apart * 2);
    _tile_loadd(5, left + 16 * apart, apart * 2);
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void store_sums(float *to, long apart) {
    _tile_stored(0, to, apart * 4);
    _tile_stored(1, to + 16, apart * 4);
    _tile_stored(2, to + 16 * apart, apart * 4);
    _tile_stored(3, to + 16 * apart + 16, apart * 4);
}

/* 32 queries at positions [at, at + 32) of a prompt over its tokens up to there. p: scores [32][C], w: weights (bf16). */
static void tile_of_queries(const step *s, const bf16 *q_32D, long at, const bf16 *k, const bf16 *v, float *p, bf16 *w, float *out_32D) {
    long dim = s->dim, num = at + QUERIES, apart = num + APART;
    float whole[QUERIES];
    WRITTEN;
    for (long c = 0; c < num; c += 32) {
        const bf16 *tile = k + (c / 16) * (dim / 32) * 512;
        zero_sums();
        for (long d = 0; d < dim; d += 32, tile += 512) {
            add_products(q_32D + d, dim, tile, tile + (dim / 32) * 512);
        }
        store_sums(p + c, apart);
    }
    for (long r = 0; r < QUERIES; r++) whole[r] = weigh_narrow(p + r * apart, at + r + 1, num, s->scale, w + r * apart);
    WRITTEN;
    for (long d = 0; d < dim; d += 32) {
        zero_sums();
        for (long c = 0; c < num; c += 32) {
            const bf16 *tile = v + ((c / 32) * (dim / 16) + d / 16) * 512;
            add_products(w + c, apart, tile, tile + 512);
        }
        store_sums(out_32D + d, dim);
    }
    for (long r = 0; r < QUERIES; r++)
        for (long d = 0; d < dim; d++) out_32D[r * dim + d] /= whole[r];
}

/* One head of a piece of a prompt: rows [begin, end) of the step, the first at position `start`; D a multiple of 32. */
static void piece(const step *s, long n, long h, const bf16 *q, const bf16 *keys, const bf16 *values, bf16 *out, void *room) {
    long dim = s->dim, start = s->start_P[n], begin = s->begin_P[n], stop = start + s->end_P[n] - begin;
    long up = (stop + 31) / 32 * 32;
    float *p = room, *sums = p + QUERIES * (up + APART);
    bf16 *w = (bf16 *)(sums + QUERIES * dim), *k = w + QUERIES * (up + APART), *v = k + up * dim, *mine = v + up * dim;
    lay_out(s, s->words + s->table_P[n], h, stop, keys, values, k, v);
    for (long at = start / QUERIES * QUERIES; at < stop; at += QUERIES) {
        long low = at < start ? start : at, high = at + QUERIES < stop ? at + QUERIES : stop;
        memset(mine, 0, QUERIES * dim * 2);
        for (long i = low; i < high; i++) memcpy(mine + (i - at) * dim, q + (begin + i - start) * s->stride + h * dim, dim * 2);
        tile_of_queries(s, mine, at, k, v, p, w, sums);
        for (long i = low; i < high; i++) {
            bf16 *to = out + ((begin + i - start) * s->heads + h) * dim;
            for (long d = 0; d < dim; d += 16)
                _mm256_storeu_si256((__m256i *)(to + d), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + (i - at) * dim + d)));
        }
    }
}

enum { FEW = 36, PART = 128 };

/* As lay_out, in fp32, in panels for multiply_rows: keys [C / 64][D][64], values [D / 64][C][64], zeros up to whole ones. */
static void lay_out_wide(const step *s, const int32_t *table, long h, long context, const float *keys, const float *values, float *k, float *v) {
    long dim = s->dim, block = s->heads * s->size, up = up_to(context, WIDE);
    memset(k + (context / WIDE) * WIDE * dim, 0, (up - context / WIDE * WIDE) * dim * 4);
    if (dim % WIDE) memset(v, 0, up_to(dim, WIDE) * context * 4);
    for (long c = 0; c < context; c++) {
        long from = (table[c / s->size] * block + h * s->size + c % s->size) * dim;
        float *to = k + c / WIDE * WIDE * dim + c % WIDE;
        for (long d = 0; d < dim; d++) to[d * WIDE] = keys[from + d];
        for (long d = 0; d < dim; d += WIDE)
            memcpy(v + (d * context) + c * WIDE, values + from + d, (dim - d < WIDE ? dim - d : WIDE) * 4);
    }
}

/* One head of a piece of a prompt in fp32, FEW queries at a time: each is one chain of sums, whatever is beside it. */
static void piece_wide(const step *s, long n, long h, const float *q, const float *keys, const float *values, float *out, float *p) {
    long dim = s->dim, start = s->start_P[n], begin = s->begin_P[n], stop = start + s->end_P[n] - begin;
    long most = up_to(stop, WIDE), broad = up_to(dim, WIDE);
    float *sums = p + FEW * most, *k = sums + FEW * broad, *v = k + most * dim, whole[FEW];
    lay_out_wide(s, s->words + s->table_P[n], h, stop, keys, values, k, v);
    for (long at = start; at < stop; at += FEW) {
        long rows = stop - at < FEW ? stop - at : FEW, num = at + rows;
        const float *mine = q + (begin + at - start) * s->stride + h * dim;
        for (long c = 0; c < num; c += WIDE)
            for (long r = 0; r < rows; r += TALL)
                multiply_rows(mine + r * s->stride, s->stride, rows - r < TALL ? rows - r : TALL, k + c * dim, dim, p + r * most + c, most, 0, 0);
        for (long r = 0; r < rows; r++) whole[r] = weigh(p + r * most, at + r + 1, num, s->scale);
        for (long d = 0; d < dim; d += WIDE)
            for (long c = 0; c < num; c += PART)
                for (long r = 0; r < rows; r += TALL)
                    multiply_rows(p + r * most + c, most, rows - r < TALL ? rows - r : TALL, v + d * stop + c * WIDE,
                                  num - c < PART ? num - c : PART, sums + r * broad + d, broad, c > 0, 0);
        for (long r = 0; r < rows; r++)
            for (long d = 0; d < dim; d++) out[((begin + at - start + r) * s->heads + h) * dim + d] = sums[r * broad + d] / whole[r];
    }
}

void attend_prompt(const step *s, long n, long h, const char *q, const char *keys, const char *values, char *out, int bytes, void *room) {
    if (bytes == 2) {
        configure(16, 16);
        piece(s, n, h, (const bf16 *)q, (const bf16 *)keys, (const bf16 *)values, (bf16 *)out, room);
    } else piece_wide(s, n, h, (const float *)q, (const float *)keys, (const float *)values, (float *)out, room);
}

size_t prompt_room(const step *s, long context, int bytes) {
    long up = up_to(context, WIDE);
    if (bytes == 2) return QUERIES * (up + APART + s->dim) * 4 + (QUERIES * (up + APART) + 2 * up * s->dim + QUERIES * s->dim) * 2;
    return (FEW * (up + up_to(s->dim, WIDE)) + up * (s->dim + up_to(s->dim, WIDE))) * 4;
}
