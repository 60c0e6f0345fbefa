/* A step from a Batch's words, and its tokens' rows of the tables. */
#include "step.h"

enum { HEAD = 5, TOKENS = 16 }; /* words before an item's tokens; a piece's */

/* Words as `Batch.words` in core/batch.py has them; they must outlive the step. `room`: for 7 numbers of each token, first the
 * tokens and their positions, and 4 of each item. `wanted`: the rows whose logits are; gives how many. Without `pieces` prompts
 * are attended elsewhere. */
long metaseq_plan(const int32_t *words, step *s, int32_t *room, int64_t *wanted, int pieces) {
    long num_items = words[0], num = s->num_tokens, t = 0, singles = 0, prompts = 0, rows = 0, at = 1;
    int32_t *token_T = room, *position_T = token_T + num, *block_T = position_T + num, *offset_T = block_T + num;
    int32_t *row_B = offset_T + num, *context_B = row_B + num, *table_B = context_B + num;
    int32_t *begin_P = table_B + num, *end_P = begin_P + num_items, *start_P = end_P + num_items, *table_P = start_P + num_items;
    for (long n = 0; n < num_items; n++) {
        const int32_t *item = words + at;
        long start = item[0], logits = item[1], prompt = item[2], tokens = item[3], table = at + HEAD + tokens;
        for (long i = 0; i < tokens; i++) {
            token_T[t + i] = item[HEAD + i];
            position_T[t + i] = start + i;
            block_T[t + i] = words[table + (start + i) / s->size];
            offset_T[t + i] = (start + i) % s->size;
        }
        if (prompt && pieces) {
            begin_P[prompts] = t;
            end_P[prompts] = t + prompt;
            start_P[prompts] = start;
            table_P[prompts++] = table;
        }
        for (long i = prompt; i < tokens; i++) {
            row_B[singles] = t + i;
            context_B[singles] = start + i + 1;
            table_B[singles++] = table;
        }
        for (long i = tokens - logits; i < tokens; i++) wanted[rows++] = t + i;
        t += tokens;
        at = table + item[4];
    }
    s->words = words;
    s->block_T = block_T, s->offset_T = offset_T;
    s->row_B = row_B, s->context_B = context_B, s->table_B = table_B;
    s->begin_P = begin_P, s->end_P = end_P, s->start_P = start_P, s->table_P = table_P;
    s->num_single = singles, s->num_pieces = prompts;
    return rows;
}

typedef struct {
    const int32_t *token_T, *position_T;
    const char *table, *positions;
    char *x;
    long num_tokens, width;
    int bytes;
} embed_job;

static void embed_tokens(const void *about, long piece) {
    const embed_job *j = about;
    for (long t = piece * TOKENS; t < least(j->num_tokens, (piece + 1) * TOKENS); t++)
        for (long i = 0; i < j->width; i += 16) {
            __mmask16 mask = lanes(j->width - i);
            long from = j->token_T[t] * j->width + i, place = j->position_T[t] * j->width + i, to = t * j->width + i;
            if (j->bytes == 4) {
                __m512 v = _mm512_maskz_loadu_ps(mask, (const float *)j->table + from);
                _mm512_mask_storeu_ps((float *)j->x + to, mask, _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, (const float *)j->positions + place)));
            } else {
                __m512 v = _mm512_add_ps(MASKED16(mask, (const bf16 *)j->table + from), MASKED16(mask, (const bf16 *)j->positions + place));
                _mm256_mask_storeu_epi16((bf16 *)j->x + to, mask, (__m256i)_mm512_cvtneps_pbh(v));
            }
        }
}

/* x [T, D]: each token's row of the table and, of `positions`, its position's, added. `bytes` 2: bf16, 4: fp32. */
void metaseq_embed(const int32_t *token_T, const int32_t *position_T, const char *table, const char *positions, char *x,
                   long num_tokens, long width, int bytes, int threads) {
    embed_job job = {token_T, position_T, table, positions, x, num_tokens, width, bytes};
    share_out(up_to(num_tokens, TOKENS) / TOKENS, embed_tokens, &job, threads);
}
