/* Linear layers in bf16, by tiles; sums are fp32. */
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu.h"

/* Ask the kernel for the tiles' registers; 0 where it gives them. */
int metaseq_begin(void) { return syscall(SYS_arch_prctl, 0x1023, 18); }

enum { PANEL = 32, STEP = 32 };

/* W [O, I] -> [O / 32][I / 32][2][16][16][2]: for each 32 inputs two tiles of 16 outputs; O is filled up with zeros. */
void metaseq_pack(const bf16 *w, bf16 *packed, long num_outputs, long num_inputs, int threads) {
    long panels = (num_outputs + PANEL - 1) / PANEL, steps = num_inputs / STEP;
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < panels; p++)
        for (long s = 0; s < steps; s++)
            for (int o = 0; o < PANEL; o++)
                for (int i = 0; i < STEP; i++) {
                    long from = p * PANEL + o;
                    bf16 *tile = packed + ((p * steps + s) * 2 + o / 16) * 512;
                    tile[(i / 2) * 32 + (o % 16) * 2 + i % 2] = from < num_outputs ? w[from * num_inputs + s * STEP + i] : 0;
                }
}

/* Sums of up to 32 rows and one panel into sums[32][32]. */
static void multiply(const bf16 *x, long stride, int rows, const bf16 *panel, long steps, float *sums) {
    WRITTEN;
    _tile_zero(0);
    _tile_zero(1);
    if (rows <= 16) {
        for (long s = 0; s < steps; s++, x += STEP, panel += 1024) {
            _mm_prefetch((const char *)(panel + 8192), _MM_HINT_T0);
            _tile_loadd(4, x, stride * 2);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        const bf16 *more = x + 16 * stride;
        for (long s = 0; s < steps; s++, x += STEP, more += STEP, panel += 1024) {
            _tile_loadd(4, x, stride * 2);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, more, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, sums + 16 * PANEL, PANEL * 4);
        _tile_stored(3, sums + 16 * PANEL + 16, PANEL * 4);
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + 16, PANEL * 4);
}

/* Bias, residual and activation, then one rounding to bf16 (`bytes` 2) or none (4). */
static void finish(const float *sums, int rows, int num, const bf16 *bias, const bf16 *residual, char *y, long stride, int relu, int bytes) {
    for (int half = 0; half < 2 && half * 16 < num; half++) {
        int left = num - half * 16;
        __mmask16 mask = lanes(left);
        __m512 b = _mm512_setzero_ps();
        if (bias) b = MASKED16(mask, bias + half * 16);
        for (int r = 0; r < rows; r++) {
            __m512 v = _mm512_add_ps(_mm512_loadu_ps(sums + r * PANEL + half * 16), b);
            if (relu) v = _mm512_max_ps(_mm512_setzero_ps(), v); /* in this order a NaN stays one */
            if (residual) v = _mm512_add_ps(v, MASKED16(mask, residual + r * stride + half * 16));
            char *to = y + (r * stride + half * 16) * bytes;
            if (bytes == 4) _mm512_mask_storeu_ps(to, mask, v);
            else _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}

/* y = relu?(x W^T + b) + residual. x [T, I] with rows `stride` apart, y and residual [T, O]. */
void metaseq_linear(const bf16 *x, long stride, const bf16 *packed, const bf16 *bias, const bf16 *residual, char *y,
                    long num_rows, long num_inputs, long num_outputs, int relu, int bytes, int threads) {
    long panels = (num_outputs + PANEL - 1) / PANEL, steps = num_inputs / STEP;
    long chunk = (1 << 20) / (num_inputs * 2) / 32 * 32; /* rows whose inputs stay in the second cache */
    if (chunk < 32) chunk = 32;
#pragma omp parallel num_threads(threads)
    {
        float sums[32 * PANEL] __attribute__((aligned(64)));
        int low = -1, high = -1;
        for (long first = 0; first < num_rows; first += chunk) {
            long last = first + chunk < num_rows ? first + chunk : num_rows;
#pragma omp for schedule(dynamic) nowait /* a core may be taken away meanwhile */
            for (long p = 0; p < panels; p++) {
                const bf16 *panel = packed + p * steps * 1024;
                int num = num_outputs - p * PANEL < PANEL ? num_outputs - p * PANEL : PANEL;
                for (long t = first; t < last; t += 32) {
                    int rows = last - t < 32 ? last - t : 32;
                    if (low != (rows < 16 ? rows : 16) || high != rows - low) {
                        low = rows < 16 ? rows : 16;
                        high = rows - low;
                        configure(low, high);
                    }
                    multiply(x + t * stride, stride, rows, panel, steps, sums);
                    finish(sums, rows, num, bias ? bias + p * PANEL : 0,
                           residual ? residual + t * num_outputs + p * PANEL : 0,
                           y + (t * num_outputs + p * PANEL) * bytes, num_outputs, relu, bytes);
                }
            }
        }
        _tile_release();
    }
}
