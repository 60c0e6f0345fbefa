/* Products in fp32: six rows by a panel of 64 columns. */
#include "cpu.h"

enum { WIDE = 64, TALL = 6 };

/* Up to TALL rows x and one panel [num][64] to rows y, `stride` and `across` apart: every output is one chain of sums over
 * the inputs, however many rows there are. y starts where the inputs before these left it (`more`), or at 0. For each
 * input a line of 64 bytes from `ahead` on is fetched, for later, unless that is null. */
INLINE void multiply_wide(const float *x, long stride, const int rows, const float *panel, long num, float *y, long across, int more,
                          const float *ahead) {
    const long line = ahead ? 16 : 0;
    if (!ahead) ahead = x;
    __m512 sum[TALL][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[r][j] = more ? _mm512_loadu_ps(y + r * across + j * 16) : _mm512_setzero_ps();
    for (long i = 0; i < num; i++, panel += WIDE) {
        __m512 w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) w[j] = _mm512_loadu_ps(panel + j * 16);
        _mm_prefetch((const char *)(panel + 16 * WIDE), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 16), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 32), _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + 16 * WIDE + 48), _MM_HINT_T0);
        _mm_prefetch((const char *)(ahead + i * line), _MM_HINT_T1);
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

static inline void multiply_rows(const float *x, long stride, int rows, const float *panel, long num, float *y, long across, int more,
                                 const float *ahead) {
    switch (rows) {
    case 1: multiply_wide(x, stride, 1, panel, num, y, across, more, ahead); break;
    case 2: multiply_wide(x, stride, 2, panel, num, y, across, more, ahead); break;
    case 3: multiply_wide(x, stride, 3, panel, num, y, across, more, ahead); break;
    case 4: multiply_wide(x, stride, 4, panel, num, y, across, more, ahead); break;
    case 5: multiply_wide(x, stride, 5, panel, num, y, across, more, ahead); break;
    default: multiply_wide(x, stride, 6, panel, num, y, across, more, ahead);
    }
}
