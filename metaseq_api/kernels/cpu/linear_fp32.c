/* Linear layers in fp32. */
#include "wide.h"

enum { CHUNK = 96, PART = 128 }; /* rows at once, and of their inputs so many that a panel of them stays in the first cache */

typedef struct {
    const float *w;
    float *packed;
    long num_outputs, num_inputs;
} pack_job;

static void pack_panel(const void *about, long p) {
    const pack_job *j = about;
    for (long o = 0; o < WIDE; o++) {
        long from = p * WIDE + o;
        for (long i = 0; i < j->num_inputs; i++)
            j->packed[(p * j->num_inputs + i) * WIDE + o] = from < j->num_outputs ? j->w[from * j->num_inputs + i] : 0;
    }
}

/* W [O, I] -> [O / 64][I][64], O filled up with zeros. */
void metaseq_pack_wide(const float *w, float *packed, long num_outputs, long num_inputs, int threads) {
    pack_job job = {w, packed, num_outputs, num_inputs};
    share_out(up_to(num_outputs, WIDE) / WIDE, pack_panel, &job, threads);
}

typedef struct {
    const float *x, *packed, *bias, *residual;
    float *y;
    long stride, num_rows, num_inputs, num_outputs, panels;
    int relu;
} linear_job;

static void linear_piece(const void *about, long piece) {
    const linear_job *j = about;
    long p = piece % j->panels, first = piece / j->panels * CHUNK, rows = least(j->num_rows - first, CHUNK);
    long part = rows > TALL ? PART : j->num_inputs, end = least(j->num_outputs, (p + 1) * WIDE);
    float sums[CHUNK * WIDE] __attribute__((aligned(64)));
    for (long i = 0; i < j->num_inputs; i += part) {
        const float *panel = j->packed + (p * j->num_inputs + i) * WIDE;
        for (long t = 0; t < rows; t += TALL) { /* the first rows fetch the next part of the panel */
            const float *ahead = rows > TALL && t < 4 * TALL ? panel + part * WIDE + t / TALL * part * 16 : 0;
            multiply_rows(j->x + (first + t) * j->stride + i, j->stride, least(rows - t, TALL), panel,
                          least(j->num_inputs - i, part), sums + t * WIDE, WIDE, i > 0, ahead);
        }
    }
    for (long t = 0; t < rows; t++)
        for (long o = p * WIDE; o < end; o += 16) {
            __mmask16 mask = lanes(j->num_outputs - o);
            long at = (first + t) * j->num_outputs + o;
            __m512 v = _mm512_loadu_ps(sums + t * WIDE + o - p * WIDE);
            if (j->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, j->bias + o));
            if (j->relu) v = _mm512_max_ps(_mm512_setzero_ps(), v); /* or a NaN is lost */
            if (j->residual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, j->residual + at));
            _mm512_mask_storeu_ps(j->y + at, mask, v);
        }
}

/* y = relu?(x W^T + b) + residual in fp32. */
void metaseq_linear_wide(const float *x, long stride, const float *packed, const float *bias, const float *residual, float *y,
                         long num_rows, long num_inputs, long num_outputs, int relu, int threads) {
    long panels = up_to(num_outputs, WIDE) / WIDE;
    linear_job job = {x, packed, bias, residual, y, stride, num_rows, num_inputs, num_outputs, panels, relu};
    share_out(panels * (up_to(num_rows, CHUNK) / CHUNK), linear_piece, &job, threads);
}
