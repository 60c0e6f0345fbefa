/* Linear layers in fp32. */
#include "cpu.h"

enum { WIDE = 64, TALL = 6 };

/* W [O, I] -> [O / 64][I][64], O filled up with zeros. */
void metaseq_pack_wide(const float *w, float *packed, long num_outputs, long num_inputs, int threads) {
    long panels = (num_outputs + WIDE - 1) / WIDE;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < panels; p++)
        for (long o = 0; o < WIDE; o++) {
            long from = p * WIDE + o;
            for (long i = 0; i < num_inputs; i++)
                packed[(p * num_inputs + i) * WIDE + o] = from < num_outputs ? w[from * num_inputs + i] : 0;
        }
}

/* Up to TALL rows and one panel: every output is one chain of sums over the inputs, however many rows there are.
 * y starts where the inputs before these left it (`more`), or at 0. */
INLINE void multiply_wide(const float *x, long stride, const int rows, const float *panel, long num, float *y, int more) {
    __m512 sum[TALL][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = more ? _mm512_loadu_ps(y + r * WIDE + j * 16) : _mm512_setzero_ps();
    for (long i = 0; i < num; i++, panel += WIDE) {
        __m512 w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) w[j] = _mm512_loadu_ps(panel + j * 16);
        _mm_prefetch((const char *)(panel + 16 * WIDE), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 16), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 32), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 48), _MM_HINT_T0);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_set1_ps(x[r * stride + i]);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[r][j] = _mm512_fmadd_ps(v, w[j], sum[r][j]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(y + r * WIDE + j * 16, sum[r][j]);
}

static void multiply_rows(const float *x, long stride, int rows, const float *panel, long num, float *y, int more) {
    switch (rows) {
    case 1: multiply_wide(x, stride, 1, panel, num, y, more); break;
    case 2: multiply_wide(x, stride, 2, panel, num, y, more); break;
    case 3: multiply_wide(x, stride, 3, panel, num, y, more); break;
    case 4: multiply_wide(x, stride, 4, panel, num, y, more); break;
    case 5: multiply_wide(x, stride, 5, panel, num, y, more); break;
    default: multiply_wide(x, stride, 6, panel, num, y, more);
    }
}

/* y = relu?(x W^T + b) + residual in fp32; inputs in parts that fit the first cache beside a panel's, rows in chunks. */
void metaseq_linear_wide(const float *x, long stride, const float *packed, const float *bias, const float *residual, float *y,
                         long num_rows, long num_inputs, long num_outputs, int relu, int threads) {
    enum { CHUNK = 96, PART = 256 };
    long panels = (num_outputs + WIDE - 1) / WIDE;
#pragma omp parallel num_threads(threads)
    {
        float *sums = aligned_alloc(64, CHUNK * WIDE * 4);
        for (long first = 0; first < num_rows; first += CHUNK) {
            long rows = num_rows - first < CHUNK ? num_rows - first : CHUNK;
            long part = rows > TALL ? PART : num_inputs;
#pragma omp for schedule(static) nowait
            for (long p = 0; p < panels; p++) {
                for (long i = 0; i < num_inputs; i += part) {
                    long num = num_inputs - i < part ? num_inputs - i : part;
                    for (long t = 0; t < rows; t += TALL)
                        multiply_rows(x + (first + t) * stride + i, stride, rows - t < TALL ? rows - t : TALL,
                                      packed + (p * num_inputs + i) * WIDE, num, sums + t * WIDE, i > 0);
                }
                for (long t = 0; t < rows; t++)
                    for (long o = p * WIDE; o < num_outputs && o < (p + 1) * WIDE; o += 16) {
                        long left = num_outputs - o;
                        __mmask16 mask = lanes(left);
                        long at = (first + t) * num_outputs + o;
                        __m512 v = _mm512_loadu_ps(sums + t * WIDE + o - p * WIDE);
                        if (bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, bias + o));
                        if (relu) v = _mm512_max_ps(_mm512_setzero_ps(), v); /* or a NaN is lost */
                        if (residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, residual + at));
                        _mm512_mask_storeu_ps(y + at, mask, v);
                    }
            }
        }
        free(sums);
    }
}
