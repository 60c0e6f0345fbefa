/* Weights in the order in which products read them: tiles for linear.c, columns for linear_fp32.c. */
#include "wide.h"

typedef struct {
    const char *w;
    char *packed;
    long num_outputs, num_inputs;
    int stored;
} pack_job;

/* 64 bytes of each of 16 outputs side by side: far apart, as rows of a weight lie, they displace each other. What there is
 * not of them is 0. */
INLINE void take_block(const pack_job *j, long output, long input, long bytes, char *block) {
    for (long o = output; o < output + 16; o++, block += 64) {
        long there = o < j->num_outputs ? least((j->num_inputs - input) * bytes, 64) : 0;
        __mmask64 mask = there == 64 ? ~0ULL : (1ULL << there) - 1;
        _mm512_store_si512(block, _mm512_maskz_loadu_epi8(mask, j->w + (o * j->num_inputs + input) * bytes));
    }
}

/* Of each of a block's outputs the k-th 4 bytes. */
INLINE __m512i column(const char *block, int k) {
    const __m512i row = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 6);
    return _mm512_i32gather_epi32(row, block + 4 * k, 1);
}

INLINE __m256i low_halves(__m512i pairs) { return _mm512_cvtepi32_epi16(pairs); }
INLINE __m256i high_halves(__m512i pairs) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)); }

/* 16 pairs of fp16 numbers in bf16, rounded to nearest even. */
INLINE __m512i rounded(__m512i pairs) {
    __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_cvtph_ps(low_halves(pairs)));
    __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_cvtph_ps(high_halves(pairs)));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

static void pack_tiles(const void *about, long p) {
    const pack_job *j = about;
    char block[1024] __attribute__((aligned(64)));
    char *tile = j->packed + p * j->num_inputs * 64;
    for (long i = 0; i < j->num_inputs; i += 32)
        for (long o = p * 32; o < p * 32 + 32; o += 16, tile += 1024) {
            take_block(j, o, i, 2, block);
            for (int k = 0; k < 16; k++) {
                __m512i pairs = column(block, k);
                _mm512_storeu_si512(tile + k * 64, j->stored == FP16 ? rounded(pairs) : pairs);
            }
        }
}

/* W [O, I], stored in bf16 or in fp16, which is rounded -> [O / 32][I / 32][2][16][16][2]: for each 32 inputs two tiles of
 * 16 outputs; O is filled up with zeros. */
void metaseq_pack(const char *w, char *packed, long num_outputs, long num_inputs, int stored, int threads) {
    pack_job job = {w, packed, num_outputs, num_inputs, stored};
    share_out(up_to(num_outputs, 32) / 32, pack_tiles, &job, threads);
}

static void pack_columns(const void *about, long p) {
    const pack_job *j = about;
    const long bytes = stored_bytes(j->stored), across = WIDE * bytes;
    char block[1024] __attribute__((aligned(64)));
    for (long i = 0; i < j->num_inputs; i += 64 / bytes)
        for (long o = 0; o < WIDE; o += 16) {
            take_block(j, p * WIDE + o, i, bytes, block);
            char *to = j->packed + (p * j->num_inputs + i) * across + o * bytes;
            long left = j->num_inputs - i;
            for (int k = 0; k < 16; k++) {
                __m512i found = column(block, k);
                if (bytes == 4) {
                    if (k < left) _mm512_storeu_si512(to + k * across, found);
                    continue;
                }
                if (2 * k < left) _mm256_storeu_si256((__m256i *)(to + 2 * k * across), low_halves(found));
                if (2 * k + 1 < left) _mm256_storeu_si256((__m256i *)(to + (2 * k + 1) * across), high_halves(found));
            }
        }
}

/* W [O, I] -> [O / 64][I][64] as it is stored, O filled up with zeros. */
void metaseq_pack_wide(const char *w, char *packed, long num_outputs, long num_inputs, int stored, int threads) {
    pack_job job = {w, packed, num_outputs, num_inputs, stored};
    share_out(up_to(num_outputs, WIDE) / WIDE, pack_columns, &job, threads);
}
