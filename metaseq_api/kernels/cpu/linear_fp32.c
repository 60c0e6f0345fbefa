/* Linear layers in fp32, whose weights are stored in fp32 or in half of the bytes. */
#include "wide.h"

/* Rows at once, and of their inputs so many that a panel of them stays in the first cache, beside its halves if need be. */
enum { CHUNK = 96, PART = 128, PART_OF_HALVES = 96 };

typedef struct {
    const float *x, *bias, *residual;
    const char *packed;
    float *y;
    long stride, num_rows, num_inputs, num_outputs, panels;
    int relu, stored;
} linear_job;

/* Up to TALL rows by a part of a panel of halves; TALL rows keep it in fp32 for those after them. */
static void multiply_halves(const float *x, long stride, int rows, const char *panel, int stored, long num, float *y, int more,
                            const char *ahead, float *keep) {
    if (stored == FP16 && keep) multiply_wide(x, stride, TALL, panel, FP16, num, y, WIDE, more, ahead, keep);
    else if (keep) multiply_wide(x, stride, TALL, panel, BF16, num, y, WIDE, more, ahead, keep);
    else if (stored == FP16) multiply_stored(x, stride, rows, panel, FP16, num, y, WIDE, more, ahead);
    else multiply_stored(x, stride, rows, panel, BF16, num, y, WIDE, more, ahead);
}

/* All inputs of a panel, by all rows of a chunk; the first rows fetch the next part of the panel, and widen this one. */
static void multiply_chunk(const linear_job *j, long p, const float *x, long rows, float *sums) {
    float wide[PART_OF_HALVES * WIDE] __attribute__((aligned(64)));
    const long many = rows > TALL, halves = j->stored != FP32, column = WIDE * stored_bytes(j->stored);
    const long part = !many ? j->num_inputs : halves ? PART_OF_HALVES : PART;
    const char *panel = j->packed + p * j->num_inputs * column;
    for (long i = 0; i < j->num_inputs; i += part, x += part, panel += part * column) {
        const char *next = panel + part * column;
        long num = least(j->num_inputs - i, part);
        for (long t = 0; t < rows; t += TALL, next += part * 64) {
            const char *ahead = many && next < panel + 2 * part * column ? next : 0;
            const float *from = x + t * j->stride;
            float *to = sums + t * WIDE;
            long now = least(rows - t, TALL);
            if (halves && t == 0) multiply_halves(from, j->stride, now, panel, j->stored, num, to, i > 0, ahead, many ? wide : 0);
            else multiply_rows(from, j->stride, now, halves ? wide : (const void *)panel, num, to, WIDE, i > 0, ahead);
        }
    }
}

static void linear_piece(const void *about, long piece) {
    const linear_job *j = about;
    long p = piece % j->panels, first = piece / j->panels * CHUNK, rows = least(j->num_rows - first, CHUNK);
    long end = least(j->num_outputs, (p + 1) * WIDE);
    float sums[CHUNK * WIDE] __attribute__((aligned(64)));
    multiply_chunk(j, p, j->x + first * j->stride, rows, sums);
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
void metaseq_linear_wide(const float *x, long stride, const char *packed, int stored, const float *bias, const float *residual, float *y,
                         long num_rows, long num_inputs, long num_outputs, int relu, int threads) {
    long panels = up_to(num_outputs, WIDE) / WIDE;
    linear_job job = {x, bias, residual, packed, y, stride, num_rows, num_inputs, num_outputs, panels, relu, stored};
    share_out(panels * (up_to(num_rows, CHUNK) / CHUNK), linear_piece, &job, threads);
}
