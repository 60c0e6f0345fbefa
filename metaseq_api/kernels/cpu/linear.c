/* Linear layers in bf16, by tiles; sums are fp32. */
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu.h"

/* Ask the kernel for the tiles' registers; 0 where it gives them. */
int metaseq_begin(void) { return syscall(SYS_arch_prctl, 0x1023, 18); }

/* So many outputs and inputs at once; of the inputs, and of the rows, so many that both stay in the second cache. */
enum { PANEL = 32, STEP = 32, PART = 1024, CHUNK = 256 };

/* Sums of up to 32 rows and one panel into sums[32][32], on top of what is there (`more`) or of 0. With each step `lines`
 * of 64 bytes from `ahead` on are fetched, for later. */
static void multiply(const bf16 *x, long stride, int rows, const bf16 *panel, long steps, float *sums, int more, const bf16 *ahead, int lines) {
    float *below = sums + 16 * PANEL;
    WRITTEN;
    if (more) {
        _tile_loadd(0, sums, PANEL * 4);
        _tile_loadd(1, sums + 16, PANEL * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (rows <= 16) {
        for (long s = 0; s < steps; s++, x += STEP, panel += 1024) {
            for (int l = 0; l < lines; l++, ahead += 32) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            _tile_loadd(4, x, stride * 2);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    } else {
        if (more) {
            _tile_loadd(2, below, PANEL * 4);
            _tile_loadd(3, below + 16, PANEL * 4);
        } else {
            _tile_zero(2);
            _tile_zero(3);
        }
        const bf16 *other = x + 16 * stride;
        for (long s = 0; s < steps; s++, x += STEP, other += STEP, panel += 1024) {
            for (int l = 0; l < lines; l++, ahead += 32) _mm_prefetch((const char *)ahead, _MM_HINT_T1);
            _tile_loadd(4, x, stride * 2);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, other, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, below, PANEL * 4);
        _tile_stored(3, below + 16, PANEL * 4);
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

typedef struct {
    const bf16 *x, *packed, *bias, *residual;
    char *y;
    long stride, num_rows, num_inputs, num_outputs, panels;
    int relu, bytes;
} linear_job;

/* Inputs from i on of a panel, by all rows of a chunk, which fetch what comes next meanwhile: where only one pass is made over
 * each panel, 8 KB ahead. */
static void multiply_part(const linear_job *j, long p, long first, long last, long i, float *sums) {
    long steps = least(j->num_inputs - i, PART) / STEP, inputs = j->num_inputs, tall = up_to(last - first, 32) / 32;
    /* the next part of this panel, or the first of the one that this thread takes next */
    const bf16 *ahead = j->packed + (i + PART < inputs ? p * inputs + i + PART : (p + 1) % j->panels * inputs) * PANEL;
    if (tall == 1) ahead = j->packed + (p * inputs + i) * PANEL + 4096;
    int lines = up_to(32, tall) / tall, low = -1, high = -1;
    for (long t = first; t < last; t += 32, sums += 32 * PANEL, ahead += steps * lines * 32) {
        int rows = least(last - t, 32);
        if (low != least(rows, 16) || high != rows - low) {
            low = least(rows, 16);
            high = rows - low;
            configure(low, high);
        }
        multiply(j->x + t * j->stride + i, j->stride, rows, j->packed + (p * inputs + i) * PANEL, steps, sums, i > 0, ahead, lines);
    }
}

static void linear_piece(const void *about, long piece) {
    const linear_job *j = about;
    long p = piece % j->panels, first = piece / j->panels * CHUNK, last = least(first + CHUNK, j->num_rows), o = p * PANEL;
    float sums[CHUNK * PANEL] __attribute__((aligned(64)));
    for (long i = 0; i < j->num_inputs; i += PART) multiply_part(j, p, first, last, i, sums);
    _tile_release();
    for (long t = first; t < last; t += 32)
        finish(sums + (t - first) * PANEL, least(last - t, 32), least(j->num_outputs - o, PANEL), j->bias ? j->bias + o : 0,
               j->residual ? j->residual + t * j->num_outputs + o : 0,
               j->y + (t * j->num_outputs + o) * j->bytes, j->num_outputs, j->relu, j->bytes);
}

/* y = relu?(x W^T + b) + residual. x [T, I] with rows `stride` apart, y and residual [T, O]. */
void metaseq_linear(const bf16 *x, long stride, const bf16 *packed, const bf16 *bias, const bf16 *residual, char *y,
                    long num_rows, long num_inputs, long num_outputs, int relu, int bytes, int threads) {
    long panels = up_to(num_outputs, PANEL) / PANEL;
    linear_job job = {x, packed, bias, residual, y, stride, num_rows, num_inputs, num_outputs, panels, relu, bytes};
    share_out(panels * (up_to(num_rows, CHUNK) / CHUNK), linear_piece, &job, threads);
}
