/* Attention over the paged cache: where a step's keys and values go, generated tokens one by one, and prompts (prompts.c). */
#include "prompts.h"
#include "weigh.h"

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

/* One head of a piece of a prompt; behind these, which take longest, some heads of generated tokens. */
static void attend_piece(const void *about, long piece_) {
    const attend_job *j = about;
    const step *s = j->s;
    long prompts = s->num_pieces * s->heads, first = (piece_ - prompts) * j->each;
    void *mine = room_for(j->room);
    if (piece_ >= prompts) {
        if (j->bytes == 2) configure_column();
        singles(s, first, least(first + j->each, s->num_single * s->heads), j->q, j->keys, j->values, j->out, j->bytes, mine);
    } else attend_prompt(s, piece_ / s->heads, piece_ % s->heads, j->q, j->keys, j->values, j->out, j->bytes, mine);
    if (j->bytes == 2) _tile_release();
}

/* Write the step's keys and values, and attend: q, k, v rows of one [T, 3 H D] -> out [T, H * D]. `bytes` 2: bf16, 4: fp32. */
void metaseq_attend(const step *s, const char *q, const char *k, const char *v, char *keys, char *values, char *out, int bytes) {
    long alone = 0, most = 0;
    for (long b = 0; b < s->num_single; b++) alone = s->context_B[b] > alone ? s->context_B[b] : alone;
    for (long n = 0; n < s->num_pieces; n++) {
        long context = s->start_P[n] + s->end_P[n] - s->begin_P[n];
        most = context > most ? context : most;
    }
    size_t room = (alone + 64) * 4, prompts = most ? prompt_room(s, most, bytes) : 0;
    if (prompts > room) room = prompts;
    long heads = s->num_single * s->heads, each = least(heads / (4 * s->threads) + 1, SINGLES);
    attend_job job = {s, q, k, v, keys, values, out, bytes, room, each};
    share_out(up_to(s->num_tokens, TOKENS) / TOKENS, put, &job, s->threads);
    share_out(s->num_pieces * s->heads + up_to(heads, each) / each, attend_piece, &job, s->threads);
}
