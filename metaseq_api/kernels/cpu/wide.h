/* Products in fp32: six rows by a panel of 64 columns, which is stored in fp32 or in half of the bytes. */
#include "cpu.h"

enum { WIDE = 64, TALL = 6 };

/* How a panel is stored (`structs.py` counts so too). A half is widened without a rounding: the products are the same. */
enum { FP32, FP16, BF16 };

INLINE size_t stored_bytes(int stored) { return stored == FP32 ? 4 : 2; }

/* 16 numbers of a panel. */
INLINE __m512 load_stored(const char *p, const int stored) {
    if (stored == FP32) return _mm512_loadu_ps(p);
    return stored == FP16 ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)) : WIDE16(p);
}

/* Up to TALL rows x and one panel [num][64] to rows y, `stride` and `across` apart: every output is one chain of sums over
 * the inputs, however many rows there are. y starts where the inputs before these left it (`more`), or at 0. For each
 * input a line of 64 bytes from `ahead` on is fetched, for later, unless that is null; and unless `keep` is, the panel is
 * written there in fp32. */
INLINE void multiply_wide(const float *x, long stride, const int rows, const char *panel, const int stored, long num, float *y,
                          long across, int more, const char *ahead, float *keep) {
    const long line = ahead ? 64 : 0, column = WIDE * stored_bytes(stored);
    if (!ahead) ahead = (const char *)x;
    __m512 sum[TALL][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = more ? _mm512_loadu_ps(y + r * across + j * 16) : _mm512_setzero_ps();
    for (long i = 0; i < num; i++, panel += column) {
        __m512 w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) w[j] = load_stored(panel + j * column / 4, stored);
        if (keep)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) _mm512_store_ps(keep + i * WIDE + j * 16, w[j]);
#pragma GCC unroll 4
        for (long l = 0; l < column; l += 64) { /* fewer rows wait for memory, many for the second cache */
            if (rows < TALL) _mm_prefetch(panel + 8192 + l, _MM_HINT_T1);
            else _mm_prefetch(panel + 4096 + l, _MM_HINT_T0);
        }
        _mm_prefetch(ahead + i * line, _MM_HINT_T1);
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
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(y + r * across + j * 16, sum[r][j]);
}

INLINE void multiply_stored(const float *x, long stride, int rows, const char *panel, const int stored, long num, float *y,
                            long across, int more, const char *ahead) {
    switch (rows) {
    case 1: multiply_wide(x, stride, 1, panel, stored, num, y, across, more, ahead, 0); break;
    case 2: multiply_wide(x, stride, 2, panel, stored, num, y, across, more, ahead, 0); break;
    case 3: multiply_wide(x, stride, 3, panel, stored, num, y, across, more, ahead, 0); break;
    case 4: multiply_wide(x, stride, 4, panel, stored, num, y, across, more, ahead, 0); break;
    case 5: multiply_wide(x, stride, 5, panel, stored, num, y, across, more, ahead, 0); break;
    default: multiply_wide(x, stride, 6, panel, stored, num, y, across, more, ahead, 0);
    }
}

static inline void multiply_rows(const float *x, long stride, int rows, const void *panel, long num, float *y, long across, int more,
                                 const char *ahead) {
    multiply_stored(x, stride, rows, panel, FP32, num, y, across, more, ahead);
}
