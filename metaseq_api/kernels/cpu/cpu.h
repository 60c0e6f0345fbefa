/* What a CPU with AVX-512 runs of our own, in bf16 where it has AMX too: the plan of a step, the lookup of its tokens, linear
 * layers, norms and attention over the paged cache in bf16 and fp32, and the choice of tokens.
 *
 * A row's bits depend on that row and on what it attends to, never on how many rows there are, on threads, or on where
 * blocks lie: every sum runs over its terms in one fixed order, and threads share out outputs, never terms.
 *
 * Knows numbers in memory. Does not know torch; `native.py` calls this, with shapes it has checked.
 *
 * Shapes: T rows, I inputs, O outputs; H heads, D head width, S tokens of a block, C tokens of a context.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

/* crew.c: have pieces 0 to `pieces` - 1 of a job done by up to so many threads, this one among them; returns when all are. */
typedef void do_piece(const void *job, long piece);
void share_out(long pieces, do_piece *piece, const void *job, int threads);
void *room_for(size_t bytes);

INLINE long up_to(long num, long step) { return (num + step - 1) / step * step; }
INLINE long least(long a, long b) { return a < b ? a : b; }

/* 16 bf16 numbers as fp32; those that `mask` has, or all. */
#define MASKED16(mask, p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16))
#define WIDE16(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))

INLINE float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* The first `num` of 16 lanes. */
INLINE __mmask16 lanes(long num) { return num >= 16 ? 0xffff : (1 << num) - 1; }

/* e^x for x <= 0; 0 below -87. */
INLINE __m512 exponent(__m512 given) {
    __m512 x = _mm512_max_ps(_mm512_set1_ps(-87.0f), given); /* in this order a NaN stays one */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    __mmask16 low = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(low, _mm512_scalef_ps(p, n), _mm512_setzero_ps());
}

/* Eight sums of 16 numbers more, in fp64. */
INLINE __m512d add_wide(__m512d sum, __m512 v) {
    sum = _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    return _mm512_add_pd(sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
}

/* The compiler does not see that a tile's load reads memory: what was written before must be there. */
#define WRITTEN __asm__ volatile("" ::: "memory")

/* Nor that a configuration is read whole: gcc's header names 8 of its 64 bytes. */
#define SEEN(at) __asm__ volatile("" ::"r"(at) : "memory")

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t width[16];
    uint8_t rows[16];
} tile_config;

/* Tiles 0-3 are sums, 4 and 5 left factors, 6 and 7 right ones. `low` and `high`: rows of the two left factors. */
INLINE void configure(int low, int high) {
    tile_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) {
        c.width[i] = 64;
        c.rows[i] = 16;
    }
    c.rows[0] = c.rows[1] = c.rows[4] = low;
    c.rows[2] = c.rows[3] = c.rows[5] = high ? high : 16;
    SEEN(&c);
    _tile_loadconfig(&c);
}
