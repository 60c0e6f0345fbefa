/* Log-probabilities of rows of scores: a given token's, its rank, and the likeliest tokens with theirs. */
#include "cpu.h"

enum { MUCH = 1 << 14 }; /* numbers of a piece, or one row */

typedef struct {
    const float *scores;
    const int64_t *rows, *chosen;
    double *out;
    long stride, num_rows, num, most, each;
} rate_job;

/* The logarithm of the sum of e to the power of each; NaN where one is, or where the highest is infinite. */
static double log_of_sum(const float *s, long num) {
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (long i = 0; i < num; i += 16) most = _mm512_mask_max_ps(most, lanes(num - i), most, _mm512_maskz_loadu_ps(lanes(num - i), s + i));
    float best = _mm512_reduce_max_ps(most);
    __m512 top = _mm512_set1_ps(best);
    __m512d sum = _mm512_setzero_pd();
    for (long i = 0; i < num; i += 16) {
        __mmask16 mask = lanes(num - i);
        sum = add_wide(sum, _mm512_maskz_mov_ps(mask, exponent(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + i), top))));
    }
    return best + log(_mm512_reduce_add_pd(sum));
}

static long num_above(const float *s, long num, float own) {
    long above = 0;
    for (long i = 0; i < num; i += 16)
        above += __builtin_popcount(_mm512_mask_cmp_ps_mask(lanes(num - i), _mm512_maskz_loadu_ps(lanes(num - i), s + i), _mm512_set1_ps(own), _CMP_GT_OQ));
    return above;
}

/* Put a score among the `n` highest so far, of `most`: in descending order, behind equal ones. */
static void insert(const float *s, long at, int64_t *ids, long n, long most) {
    long i = n < most ? n : most - 1;
    for (; i > 0 && s[at] > s[ids[i - 1]]; i--) ids[i] = ids[i - 1];
    ids[i] = at;
}

static void highest(const float *s, long num, int64_t *ids, long most) {
    for (long i = 0; i < most; i++) insert(s, i, ids, i, most);
    for (long i = most; i < num; i += 16) {
        __mmask16 mask = lanes(num - i);
        __m512 v = _mm512_maskz_loadu_ps(mask, s + i), least_ = _mm512_set1_ps(s[ids[most - 1]]);
        for (mask &= _mm512_cmp_ps_mask(v, least_, _CMP_GT_OQ); mask; mask &= mask - 1) {
            long at = i + __builtin_ctz(mask);
            if (s[at] > s[ids[most - 1]]) insert(s, at, ids, most, most);
        }
    }
}

static void rate_rows(const void *about, long piece) {
    const rate_job *j = about;
    int64_t *ids = room_for(j->most * sizeof *ids + 8);
    for (long n = piece * j->each; n < least(j->num_rows, (piece + 1) * j->each); n++) {
        const float *s = j->scores + j->rows[n] * j->stride;
        double *out = j->out + n * (2 + 2 * j->most), sum = log_of_sum(s, j->num);
        float own = s[j->chosen[j->rows[n]]];
        out[0] = (float)(own - sum);
        out[1] = num_above(s, j->num, own) + 1;
        if (j->most) highest(s, j->num, ids, j->most);
        for (long k = 0; k < j->most; k++) {
            out[2 + k] = (float)(s[ids[k]] - sum);
            out[2 + j->most + k] = ids[k];
        }
    }
}

/* scores: rows `stride` apart; chosen: a token of each. out: of each of `rows` its token's logarithm and rank (1 for the
 * likeliest), then the logarithms of the `most` likeliest, then these. */
void metaseq_rate(const float *scores, const int64_t *rows, const int64_t *chosen, double *out, long stride, long num_rows, long num,
                  long most, int threads) {
    rate_job job = {scores, rows, chosen, out, stride, num_rows, num, most, MUCH / num + 1};
    share_out(up_to(num_rows, job.each) / job.each, rate_rows, &job, threads);
}
