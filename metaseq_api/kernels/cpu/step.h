/* A step, and the parts of a layer, which `native.py` calls one by one and `layers.c` all in a row. */
#pragma once
#include "cpu.h"

/* A step as plain numbers: where each token's key and value go, the generated tokens' contexts, pieces of prompts. */
typedef struct {
    const int32_t *words;                       /* that tables of blocks begin at places of */
    const int32_t *block_T, *offset_T;          /* every token's place in the cache */
    const int32_t *row_B, *context_B, *table_B; /* generated tokens */
    const int32_t *begin_P, *end_P, *start_P, *table_P; /* pieces of prompts */
    long num_tokens, num_single, num_pieces;
    long heads, dim, size; /* H, D, S */
    long stride;           /* between the rows of q, k and v */
    float scale;
    int threads;
} step;

void metaseq_norm(const char *x, const char *w, const char *b, char *y, long num_rows, long width, float eps, int bytes, int threads);
void metaseq_linear(const bf16 *x, long stride, const bf16 *packed, const bf16 *bias, const bf16 *residual, char *y,
                    long num_rows, long num_inputs, long num_outputs, int relu, int bytes, int threads);
void metaseq_linear_wide(const float *x, long stride, const char *packed, int stored, const float *bias, const float *residual, float *y,
                         long num_rows, long num_inputs, long num_outputs, int relu, int threads);
void metaseq_attend(const step *s, const char *q, const char *k, const char *v, char *keys, char *values, char *out, int bytes);
