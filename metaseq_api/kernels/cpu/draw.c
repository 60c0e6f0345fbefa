/* One token of each row of scores: the highest, or the one that a number falls on among those that are left.
 *
 * Each token weighs exp(score). The least likely ones are taken out in this order: those too far below the best, all but
 * so many, and those behind a share of the mass of what is left, in descending order; of equal ones the first stay.
 */
#include "cpu.h"

enum { BLOCK = 1024, MUCH = 1 << 14, FEW = 64 }; /* numbers summed together; of a piece, or one row; that are sorted */

typedef struct {
    double uniform, top_p, top_k, below; /* below 0: the best; 1 and more, 0, -infinity: nothing is taken out */
} choice;

typedef struct {
    const float *scores;
    const choice *choices;
    double *drawn;
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

/* What the scores weigh, in whole 16s; nothing where they are less than `least_`. */
static void weigh_all(const float *s, float *w, long num, float best, float least_) {
    __m512 top = _mm512_set1_ps(best), bound = _mm512_set1_ps(least_);
    for (long i = 0; i < num; i += 16) {
        __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), lanes(num - i), s + i);
        __mmask16 stays = _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
        _mm512_store_ps(w + i, _mm512_maskz_mov_ps(stays, exponent(_mm512_sub_ps(v, top))));
    }
}

static double sum_of(const float *w, long num) {
    __m512d sum = _mm512_setzero_pd();
    for (long i = 0; i < num; i += 16) sum = add_wide(sum, _mm512_maskz_loadu_ps(lanes(num - i), w + i));
    return _mm512_reduce_add_pd(sum);
}

/* Copy those that are at least `pivot`, or those below it and above 0; how many. */
static long sift(const float *w, float *to, long num, float pivot, int above) {
    __m512 p = _mm512_set1_ps(pivot);
    __mmask16 flip = above ? 0 : 0xffff; /* a comparison must be known when it is compiled */
    long n = 0;
    for (long i = 0; i < num; i += 16) {
        __m512 v = _mm512_maskz_loadu_ps(lanes(num - i), w + i);
        __mmask16 takes = (_mm512_cmp_ps_mask(v, p, _CMP_GE_OQ) ^ flip) & _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
        _mm512_mask_compressstoreu_ps(to + n, takes, v);
        n += __builtin_popcount(takes);
    }
    return n;
}

static int descending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The last, in descending order, of those that it takes to come to `enough`, each counting as one or as its weight; how
 * many of that very value are among them goes to `ties`. `a` and `b` are room for as many. */
static float boundary(const float *w, float *a, float *b, long num, double enough, int by_weight, long *ties) {
    uint32_t low = 1, high = 0x3f800000; /* the bits of what weights are between; as integers they have the same order */
    double had = 0;
    const float *at = w;
    while (num > FEW && low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        float pivot;
        memcpy(&pivot, &middle, 4);
        long n = sift(at, a, num, pivot, 1);
        double more = by_weight ? sum_of(a, n) : n;
        if (had + more >= enough) low = middle;
        else {
            had += more;
            high = middle - 1;
            n = sift(at, a, num, pivot, 0);
        }
        at = a; /* what is left lies in the one, and goes to the other */
        num = n;
        float *other = b;
        b = a;
        a = other;
    }
    if (at == w) num = sift(w, b, num, 0, 1);
    if (!num) { /* all together do not come to it, as sums are rounded */
        *ties = 0;
        return 0;
    }
    qsort(b, num, sizeof *b, descending); /* one value many times, or a few */
    long n = 0, first = 0;
    for (; n < num; n++) {
        if (b[n] != b[first]) first = n;
        if ((had += by_weight ? b[n] : 1) >= enough) break;
    }
    n = n < num ? n : num - 1;
    *ties = n - first + 1;
    return b[first];
}

/* Take out what lies behind the boundary. */
static void cut(float *w, long num, float bound, long ties) {
    __m512 v, p = _mm512_set1_ps(bound);
    for (long i = 0; i < num; i += 16) {
        v = _mm512_load_ps(w + i);
        __mmask16 stays = _mm512_cmp_ps_mask(v, p, _CMP_GT_OQ), same = _mm512_cmp_ps_mask(v, p, _CMP_EQ_OQ);
        for (; same && ties; same &= same - 1, ties--) stays |= same & -same;
        _mm512_store_ps(w + i, _mm512_maskz_mov_ps(stays, v));
    }
}

/* Where `uniform` of the weights' sum lies. A token that weighs nothing is never chosen. */
static long fall(const float *w, long num, double uniform, double *sums) {
    long blocks = up_to(num, BLOCK) / BLOCK, from = 0, last = 0;
    double total = 0, before = 0, behind = 0;
    for (long b = 0; b < blocks; b++) total += sums[b] = sum_of(w + b * BLOCK, least(BLOCK, num - b * BLOCK));
    double target = uniform * total;
    for (long b = 0; b < blocks && behind <= target; b++)
        if (sums[b] > 0) {
            from = b * BLOCK;
            before = behind;
            behind += sums[b];
        }
    for (long i = from; i < least(num, from + BLOCK) && before <= target; i++)
        if (w[i] > 0) { /* the last such where rounded sums end before what they are the sum of */
            last = i;
            before += w[i];
        }
    return last;
}

static long drawn(const float *s, long num, float best, const choice *c, char *room) {
    long wide_ = up_to(num, 16), ties;
    float *w = (float *)room, *a = w + wide_, *b = a + wide_;
    weigh_all(s, w, num, best, best + (float)c->below);
    if (c->top_k > 0 && c->top_k < num) {
        float bound = boundary(w, a, b, num, c->top_k, 0, &ties);
        cut(w, num, bound, ties);
    }
    if (c->top_p < 1) {
        float bound = boundary(w, a, b, num, c->top_p * sum_of(w, num), 1, &ties);
        cut(w, num, bound, ties);
    }
    return fall(w, num, c->uniform, (double *)(b + wide_));
}

static void draw_rows(const void *about, long piece) {
    const draw_job *j = about;
    char *room = room_for(j->room);
    for (long r = piece * j->rows; r < least(j->num_rows, (piece + 1) * j->rows); r++) {
        const float *s = j->scores + r * j->stride;
        long at = highest(s, j->num);
        float best = s[at];
        const choice *c = j->choices + r;
        j->drawn[2 * r] = c->uniform >= 0 && isfinite(best) ? drawn(s, j->num, best, c, room) : at;
        j->drawn[2 * r + 1] = best;
    }
}

/* scores: rows `stride` apart; of `closed`, pairs of a row and a token, none is left. Of each row its highest token or a drawn
 * one, and the highest score. */
void metaseq_draw(float *scores, const choice *choices, const int64_t *closed, long num_closed, double *drawn, long stride,
                  long num_rows, long num, int threads) {
    for (long n = 0; n < num_closed; n++) scores[closed[2 * n] * stride + closed[2 * n + 1]] = -INFINITY;
    size_t room = 3 * up_to(num, 16) * sizeof(float) + up_to(num, BLOCK) / BLOCK * sizeof(double);
    draw_job job = {scores, choices, drawn, stride, num_rows, num, MUCH / num + 1, room};
    share_out(up_to(num_rows, job.rows) / job.rows, draw_rows, &job, threads);
}
