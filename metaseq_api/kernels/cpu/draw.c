/* One token of each row of scores: the highest, or the one that a number falls on when every token weighs exp(score). */
#include "cpu.h"

enum { BLOCK = 1024, MUCH = 1 << 14 }; /* numbers whose weights are summed together; numbers of a piece, or one row */

typedef struct {
    const float *scores;
    const double *uniform;
    float *best;
    int64_t *chosen;
    long stride, num_rows, num, rows;
    size_t room;
} draw_job;

/* The place of the first of the highest numbers; of the first NaN, where there is one. */
static long highest(const float *s, long num) {
    float best = -INFINITY;
    long from = 0, at;
    for (long b = 0; b < num; b += BLOCK) {
        long end = least(num, b + BLOCK);
        __m512 most = _mm512_set1_ps(-INFINITY);
        __mmask16 none = 0;
        for (long i = b; i < end; i += 16) {
            __m512 v = _mm512_mask_loadu_ps(most, lanes(end - i), s + i);
            none |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
            most = _mm512_max_ps(most, v);
        }
        if (none) {
            for (at = b; s[at] == s[at]; at++);
            return at;
        }
        if (_mm512_reduce_max_ps(most) > best) {
            best = _mm512_reduce_max_ps(most);
            from = b;
        }
    }
    for (at = from; s[at] != best; at++);
    return at;
}

/* What 16 numbers weigh, of which `mask` has those that there are. */
INLINE __m512 weights(const float *s, __mmask16 mask, __m512 top) {
    return _mm512_maskz_mov_ps(mask, exponent(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s), top)));
}

static double sum_of(const float *s, long num, __m512 top) {
    __m512d sum = _mm512_setzero_pd();
    for (long i = 0; i < num; i += 16) {
        __m512 w = weights(s + i, lanes(num - i), top);
        sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(w)));
        sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1)));
    }
    return _mm512_reduce_add_pd(sum);
}

/* Where `uniform` of the weights' sum lies. A token that weighs nothing is never chosen. */
static long drawn(const float *s, long num, float best, double uniform, double *sums) {
    __m512 top = _mm512_set1_ps(best);
    long blocks = up_to(num, BLOCK) / BLOCK, from = 0, last = 0;
    double total = 0, before = 0, behind = 0;
    for (long b = 0; b < blocks; b++) total += sums[b] = sum_of(s + b * BLOCK, least(BLOCK, num - b * BLOCK), top);
    double target = uniform * total;
    for (long b = 0; b < blocks && behind <= target; b++)
        if (sums[b] > 0) {
            from = b * BLOCK;
            before = behind;
            behind += sums[b];
        }
    float w[BLOCK] __attribute__((aligned(64)));
    long here = least(BLOCK, num - from);
    for (long i = 0; i < here; i += 16) _mm512_store_ps(w + i, weights(s + from + i, lanes(here - i), top));
    for (long i = 0; i < here && before <= target; i++)
        if (w[i] > 0) { /* the last such where rounded sums end before what they are the sum of */
            last = i;
            before += w[i];
        }
    return from + last;
}

static void draw_rows(const void *about, long piece) {
    const draw_job *j = about;
    double *sums = room_for(j->room);
    for (long r = piece * j->rows; r < least(j->num_rows, (piece + 1) * j->rows); r++) {
        const float *s = j->scores + r * j->stride;
        long at = highest(s, j->num);
        float best = j->best[r] = s[at];
        j->chosen[r] = j->uniform[r] >= 0 && isfinite(best) ? drawn(s, j->num, best, j->uniform[r], sums) : at;
    }
}

/* scores: rows `stride` apart. Of each row the highest score; and its token, or where `uniform` is at least 0 a drawn one. */
void metaseq_draw(const float *scores, const double *uniform, float *best, int64_t *chosen, long stride, long num_rows, long num,
                  int threads) {
    draw_job job = {scores, uniform, best, chosen, stride, num_rows, num, MUCH / num + 1, up_to(num, BLOCK) / BLOCK * sizeof(double)};
    share_out(up_to(num_rows, job.rows) / job.rows, draw_rows, &job, threads);
}
