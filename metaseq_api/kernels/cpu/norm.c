/* Layer norms of bf16 rows. */
#include "cpu.h"

/* y = (x - mean) / sqrt(variance + eps) * w + b of each row, in fp32, rounded once. */
void metaseq_norm(const bf16 *x, const bf16 *w, const bf16 *b, bf16 *y, long num_rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(num_rows < 16 ? 1 : threads) schedule(static)
    for (long t = 0; t < num_rows; t++) {
        const bf16 *row = x + t * width;
        float sum = 0, squares = 0;
        for (long i = 0; i < width; i++) sum += wide(row[i]);
        float mean = sum / width;
        for (long i = 0; i < width; i++) {
            float off = wide(row[i]) - mean;
            squares += off * off;
        }
        float by = 1.0f / sqrtf(squares / width + eps);
        for (long i = 0; i < width; i += 16) {
            __mmask16 mask = lanes(width - i);
            __m512 v = _mm512_mul_ps(_mm512_sub_ps(MASKED16(mask, row + i), _mm512_set1_ps(mean)), _mm512_set1_ps(by));
            v = _mm512_fmadd_ps(v, MASKED16(mask, w + i), MASKED16(mask, b + i));
            _mm256_mask_storeu_epi16(y + t * width + i, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}
