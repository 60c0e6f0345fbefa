/* Attention over the paged cache: of generated tokens one by one, of a prompt in tiles of queries. */
#include "step.h"
#include "wide.h"

/* For one query: tile 6 and the sums are one column wide. */
static void configure_column(void) {
    tile_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    c.rows[0] = c.rows[4] = c.rows[6] = 16;
    c.width[4] = 64;
    c.width[0] = c.width[6] = 4;
    SEEN(&c);
    _tile_loadconfig(&c);
}

/* One layer's share of it: q, k and v rows of one [T, 3 H D], the cache's pools, out [T, H * D]; `bytes` of one number. */
typedef struct {
    const step *s;
    const char *q, *k, *v;
    char *keys, *values, *out;
    int bytes;
    size_t room; /* that a thread needs for one piece */
    long each;   /* heads of generated tokens in a piece */
} attend_job;

enum { TOKENS = 64, SINGLES = 8 }; /* a piece's: tokens to their places, at most so many heads of generated tokens */

/* Keys and values of some of the step's tokens to their places. */
static void put(const void *about, long piece) {
    const attend_job *j = about;
    const step *s = j->s;
    long wide_ = s->dim * j->bytes, block = s->heads * s->size;
    for (long t = piece * TOKENS; t < least(s->num_tokens, (piece + 1) * TOKENS); t++)
        for (long h = 0; h < s->heads; h++) {
            long to = (s->block_T[t] * block + h * s->size + s->offset_T[t]) * wide_;
            long from = (t * s->stride + h * s->dim) * j->bytes;
            memcpy(j->keys + to, j->k + from, wide_);
            memcpy(j->values + to, j->v + from, wide_);
        }
}

/* The first `open` scores of `num` to weights, in place, the rest to zeros; what they sum to. A NaN stays one. */
static float weigh(float *s, long open, long num, float scale) {
    __m512 by = _mm512_set1_ps(scale), most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long i = 0; i < open; i += 16) {
        __mmask16 mask = lanes(open - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, s + i), by);
        _mm512_mask_storeu_ps(s + i, mask, v);
        most = _mm512_mask_max_ps(most, mask, most, v);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < open; i += 16) {
        __mmask16 mask = lanes(open - i);
        __m512 v = exponent(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + i), top));
        _mm512_mask_storeu_ps(s + i, mask, v);
        sum = _mm512_mask_add_ps(sum, mask, sum, v);
    }
    for (long i = open; i < num; i++) s[i] = 0;
    return _mm512_reduce_add_ps(sum);
}

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

/* out += the values of `num` tokens, weighted; sums stay in registers where the width is known. */
INLINE void gather(float *out, const float *p, const char *v, long num, long dim, int bytes) {
    if (dim > 128 || dim % 16) {
        for (long i = 0; i < num; i++)
            for (long d = 0; d < dim; d++)
                out[d] += p[i] * (bytes == 4 ? ((const float *)v)[i * dim + d] : wide(((const bf16 *)v)[i * dim + d]));
        return;
    }
    __m512 sum[8] = {0};
#pragma GCC unroll 8
    for (int j = 0; j < dim / 16; j++) sum[j] = _mm512_loadu_ps(out + j * 16);
    for (long i = 0; i < num; i++) {
        __m512 w = _mm512_set1_ps(p[i]);
#pragma GCC unroll 8
        for (int j = 0; j < dim / 16; j++) {
            const char *at = v + (i * dim + j * 16) * bytes;
            sum[j] = _mm512_fmadd_ps(w, bytes == 4 ? _mm512_loadu_ps((const float *)at) : WIDE16(at), sum[j]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < dim / 16; j++) _mm512_storeu_ps(out + j * 16, sum[j]);
}

static void weighted(float *out, const float *p, const char *v, long num, long dim, int bytes) {
    if (dim == 64 && bytes == 2) gather(out, p, v, num, 64, 2);
    else if (dim == 64) gather(out, p, v, num, 64, 4);
    else if (dim == 128 && bytes == 2) gather(out, p, v, num, 128, 2);
    else if (dim == 128) gather(out, p, v, num, 128, 4);
    else gather(out, p, v, num, dim, bytes);
}

INLINE void dots(float *s, const float *q, const char *k, long num, long dim, int bytes) {
    for (long i = 0; i < num; i++) {
        float sum = 0;
        for (long d = 0; d < dim; d++)
            sum += q[d] * (bytes == 4 ? ((const float *)k)[i * dim + d] : wide(((const bf16 *)k)[i * dim + d]));
        s[i] = sum;
    }
}

/* Scores of `num` tokens of one block; `q` as fp32 numbers, and for whole tiles as pairs in a tile of one column. */
static void scores(float *s, const float *q, const bf16 *pairs, const char *k, long num, const step *by, int bytes) {
    long dim = by->dim;
    if (bytes == 2 && dim % 32 == 0 && by->size % 16 == 0) {
        for (long i = 0; i < num; i += 16) {
            _tile_zero(0);
            for (long d = 0; d < dim; d += 32) {
                _tile_loadd(4, k + (i * dim + d) * 2, dim * 2);
                _tile_loadd(6, pairs + d, 4);
                _tile_dpbf16ps(0, 4, 6);
            }
            _tile_stored(0, s + i, 4);
        }
    } else if (dim == 64 && bytes == 4) dots(s, q, k, num, 64, 4);
    else if (dim == 128 && bytes == 4) dots(s, q, k, num, 128, 4);
    else dots(s, q, k, num, dim, bytes);
}

/* Some heads of generated tokens, each over its own blocks. */
static void singles(const step *s, long first, long last, const char *q, const char *keys, const char *values, char *out, int bytes, float *p) {
    long dim = s->dim, block = s->heads * s->size;
    for (long at = first; at < last; at++) {
        long b = at / s->heads, h = at % s->heads, context = s->context_B[b];
        const int32_t *table = s->words + s->table_B[b];
        const char *mine = q + (s->row_B[b] * s->stride + h * dim) * bytes;
        float sum_D[dim], wide_D[dim];
        memset(sum_D, 0, dim * 4);
        for (long d = 0; d < dim; d++) wide_D[d] = (bytes == 4 ? ((const float *)mine)[d] : wide(((const bf16 *)mine)[d]));
        WRITTEN;
        for (long c = 0; c < context; c += s->size) {
            long num = context - c < s->size ? context - c : s->size;
            scores(p + c, wide_D, (const bf16 *)mine, keys + (table[c / s->size] * block + h * s->size) * dim * bytes, num, s, bytes);
        }
        float whole = weigh(p, context, context, s->scale);
        for (long c = 0; c < context; c += s->size) {
            long num = context - c < s->size ? context - c : s->size;
            weighted(sum_D, p + c, values + (table[c / s->size] * block + h * s->size) * dim * bytes, num, dim, bytes);
        }
        long to = (s->row_B[b] * s->heads + h) * dim;
        for (long d = 0; d < dim; d++) {
            float y = sum_D[d] / whole;
            if (bytes == 4) ((float *)out)[to + d] = y;
            else ((bf16 *)out)[to + d] = _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(y)), 0);
        }
    }
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

/* 32 queries at positions [at, at + 32) of a prompt over its tokens up to there. p: scores [32][C], w: weights (bf16). */
static void tile_of_queries(const step *s, const bf16 *q_32D, long at, const bf16 *k, const bf16 *v, float *p, bf16 *w, float *out_32D) {
    long dim = s->dim, num = at + QUERIES, apart = num + APART;
    float whole[QUERIES];
    WRITTEN;
    for (long c = 0; c < num; c += 32) {
        const bf16 *tile = k + (c / 16) * (dim / 32) * 512;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long d = 0; d < dim; d += 32, tile += 512) {
            _tile_loadd(4, q_32D + d, dim * 2);
            _tile_loadd(5, q_32D + 16 * dim + d, dim * 2);
            _tile_loadd(6, tile, 64);
            _tile_loadd(7, tile + (dim / 32) * 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, p + c, apart * 4);
        _tile_stored(1, p + c + 16, apart * 4);
        _tile_stored(2, p + 16 * apart + c, apart * 4);
        _tile_stored(3, p + 16 * apart + c + 16, apart * 4);
    }
    for (long r = 0; r < QUERIES; r++) whole[r] = weigh_narrow(p + r * apart, at + r + 1, num, s->scale, w + r * apart);
    WRITTEN;
    for (long d = 0; d < dim; d += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long c = 0; c < num; c += 32) {
            const bf16 *tile = v + ((c / 32) * (dim / 16) + d / 16) * 512;
            _tile_loadd(4, w + c, apart * 2);
            _tile_loadd(5, w + 16 * apart + c, apart * 2);
            _tile_loadd(6, tile, 64);
            _tile_loadd(7, tile + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out_32D + d, dim * 4);
        _tile_stored(1, out_32D + d + 16, dim * 4);
        _tile_stored(2, out_32D + 16 * dim + d, dim * 4);
        _tile_stored(3, out_32D + 16 * dim + d + 16, dim * 4);
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

/* One head of a piece of a prompt; behind these, which take longest, some heads of generated tokens. */
static void attend_piece(const void *about, long piece_) {
    const attend_job *j = about;
    const step *s = j->s;
    long prompts = s->num_pieces * s->heads, first = (piece_ - prompts) * j->each;
    void *mine = room_for(j->room);
    if (piece_ >= prompts) {
        configure_column();
        singles(s, first, least(first + j->each, s->num_single * s->heads), j->q, j->keys, j->values, j->out, j->bytes, mine);
    } else if (j->bytes == 2) {
        configure(16, 16);
        piece(s, piece_ / s->heads, piece_ % s->heads, (const bf16 *)j->q, (const bf16 *)j->keys, (const bf16 *)j->values, (bf16 *)j->out, mine);
    } else piece_wide(s, piece_ / s->heads, piece_ % s->heads, (const float *)j->q, (const float *)j->keys, (const float *)j->values, (float *)j->out, mine);
    _tile_release();
}

/* Write the step's keys and values, and attend: q, k, v rows of one [T, 3 H D] -> out [T, H * D]. `bytes` 2: bf16, 4: fp32. */
void metaseq_attend(const step *s, const char *q, const char *k, const char *v, char *keys, char *values, char *out, int bytes) {
    long most = 0, up;
    for (long b = 0; b < s->num_single; b++) most = s->context_B[b] > most ? s->context_B[b] : most;
    for (long n = 0; n < s->num_pieces; n++) {
        up = s->start_P[n] + s->end_P[n] - s->begin_P[n];
        most = up > most ? up : most;
    }
    up = up_to(most, WIDE);
    size_t room = (up + 64) * 4;
    if (s->num_pieces && bytes == 2) room = QUERIES * (up + APART + s->dim) * 4 + (QUERIES * (up + APART) + 2 * up * s->dim + QUERIES * s->dim) * 2;
    if (s->num_pieces && bytes == 4) room = (FEW * (up + up_to(s->dim, WIDE)) + up * (s->dim + up_to(s->dim, WIDE))) * 4;
    long heads = s->num_single * s->heads, each = least(heads / (4 * s->threads) + 1, SINGLES);
    attend_job job = {s, q, k, v, keys, values, out, bytes, room, each};
    share_out(up_to(s->num_tokens, TOKENS) / TOKENS, put, &job, s->threads);
    share_out(s->num_pieces * s->heads + up_to(heads, each) / each, attend_piece, &job, s->threads);
}
