/* Linear layers in fp32. */
#include "wide.h"

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
#pragma omp for schedule(dynamic) nowait /* a core may be taken away meanwhile */
            for (long p = 0; p < panels; p++) {
                for (long i = 0; i < num_inputs; i += part) {
                    long num = num_inputs - i < part ? num_inputs - i : part;
                    for (long t = 0; t < rows; t += TALL)
                        multiply_rows(x + (first + t) * stride + i, stride, rows - t < TALL ? rows - t : TALL,
                                      packed + (p * num_inputs + i) * WIDE, num, sums + t * WIDE, WIDE, i > 0);
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
