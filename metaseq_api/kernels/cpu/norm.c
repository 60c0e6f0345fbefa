/* Layer norms of rows in bf16 or fp32. */
#include "cpu.h"

enum { ROWS = 16 }; /* a piece's */

typedef struct {
    const char *x, *w, *b;
    char *y;
    long num_rows, width;
    float eps;
    int bytes;
} norm_job;

/* 16 numbers of `bytes` each as fp32, those that `mask` has. */
INLINE __m512 some(const char *x, __mmask16 mask, int bytes) {
    return bytes == 4 ? _mm512_maskz_loadu_ps(mask, x) : MASKED16(mask, x);
}

INLINE void norm_row(const norm_job *j, long t, const int bytes) {
    long width = j->width;
    const char *row = j->x + t * width * bytes;
    __m512 sum = _mm512_setzero_ps(), squares = sum;
    for (long i = 0; i < width; i += 16) sum = _mm512_add_ps(sum, some(row + i * bytes, lanes(width - i), bytes));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    for (long i = 0; i < width; i += 16) {
        __mmask16 mask = lanes(width - i);
        __m512 off = _mm512_maskz_sub_ps(mask, some(row + i * bytes, mask, bytes), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + j->eps));
    for (long i = 0; i < width; i += 16) {
        __mmask16 mask = lanes(width - i);
        __m512 v = _mm512_mul_ps(_mm512_sub_ps(some(row + i * bytes, mask, bytes), mean), by);
        v = _mm512_fmadd_ps(v, some(j->w + i * bytes, mask, bytes), some(j->b + i * bytes, mask, bytes));
        char *to = j->y + (t * width + i) * bytes;
        if (bytes == 4) _mm512_mask_storeu_ps(to, mask, v);
        else _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v));
    }
}

static void norm_rows(const void *about, long piece) {
    const norm_job *j = about;
    for (long t = piece * ROWS; t < least(j->num_rows, (piece + 1) * ROWS); t++)
        if (j->bytes == 4) norm_row(j, t, 4);
        else norm_row(j, t, 2);
}

/* y = (x - mean) / sqrt(variance + eps) * w + b of each row, in fp32, rounded once. */
void metaseq_norm(const char *x, const char *w, const char *b, char *y, long num_rows, long width, float eps, int bytes, int threads) {
    norm_job job = {x, w, b, y, num_rows, width, eps, bytes};
    share_out(up_to(num_rows, ROWS) / ROWS, norm_rows, &job, threads);
}
