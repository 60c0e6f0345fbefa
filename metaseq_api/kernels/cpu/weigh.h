/* Scores to weights in fp32. */
#pragma once
#include "cpu.h"

/* The first `open` scores of `num` to weights, in place, the rest to zeros; what they sum to. A NaN stays one. */
static inline float weigh(float *s, long open, long num, float scale) {
    __m512 by = _mm512_set1_ps(scale), most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long i = 0; i < open; i += 16) {
        __mmask16 mask = lanes(open - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, s + i), by);
        _mm512_mask_storeu_ps(s + i, mask, v);
        most = _mm512_mask_max_ps(most, mask, most, v);
    }
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < open; i += 16) {
        __mmask16 mask = lanes(open - i);
        __m512 v = exponent(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, s + i), top));
        _mm512_mask_storeu_ps(s + i, mask, v);
        sum = _mm512_mask_add_ps(sum, mask, sum, v);
    }
    for (long i = open; i < num; i++) s[i] = 0;
    return _mm512_reduce_add_ps(sum);
}
