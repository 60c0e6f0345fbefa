/* Layers one after another: with few rows, calling the parts of a layer from Python takes as long as some of them. */
#include "ranks.h"
#include "step.h"

/* A weight and its bias. */
typedef struct {
    const char *w, *b;
    long stored; /* how, where it is multiplied in fp32 */
} pair;

/* A norm, a product, then attention or relu, and a product that is added to what went in. */
typedef struct {
    pair norm, first, second;
} half;

typedef struct {
    half attention, ffn;
    char *keys, *values;
} layer;

typedef struct {
    const step *s;
    ranks *ranks; /* that hold the rest of each layer and can be heard by it; null where none do, or Python sums */
    const layer *layers;
    long num_layers, width, ffn; /* D, and of this rank F */
    float eps;
    int pre_norm, residual, bytes; /* whether a norm's input is what is added to, or (350M) what it gives; whether this rank adds it */
} stack;

/* y = relu?(x W^T + b) + residual, which y may be. */
static void linear(const stack *k, const char *x, pair by, const char *residual, char *y, long num_rows, long num_inputs, long num_outputs, int relu) {
    if (k->bytes == 4)
        metaseq_linear_wide((const float *)x, num_inputs, by.w, by.stored, (const float *)by.b, (const float *)residual, (float *)y,
                            num_rows, num_inputs, num_outputs, relu, k->s->threads);
    else
        metaseq_linear((const bf16 *)x, num_inputs, (const bf16 *)by.w, (const bf16 *)by.b, (const bf16 *)residual, y,
                       num_rows, num_inputs, num_outputs, relu, k->bytes, k->s->threads);
}

/* Some rows to the front, in their order. */
static void gather(char *x, const int64_t *rows, long num, size_t row) {
    for (long r = 0; r < num; r++) memmove(x + r * row, x + rows[r] * row, row);
}

/* One half, by `num` rows; how many it leaves. The last attention's product goes on with those that are wanted alone, which
 * are the first ones of x then. */
static long run(const stack *k, long n, char *x, char *room, long num, const int64_t *wanted, long num_wanted) {
    const step *s = k->s;
    const layer *l = k->layers + n / 2;
    const half *now = n % 2 ? &l->ffn : &l->attention;
    long width = k->width, inner = s->heads * s->dim;
    size_t row = width * k->bytes, own = inner * k->bytes;
    char *h = room, *qkv = h + s->num_tokens * row, *o = qkv + s->num_tokens * 3 * own, *f = o + s->num_tokens * own;
    char *in = k->pre_norm ? h : x;
    if (now->norm.w) metaseq_norm(x, now->norm.w, now->norm.b, in, num, width, k->eps, k->bytes, s->threads);
    if (n % 2) {
        linear(k, in, now->first, 0, f, num, width, k->ffn, 1);
        linear(k, f, now->second, k->residual ? x : 0, x, num, k->ffn, width, 0);
        return num;
    }
    linear(k, in, now->first, 0, qkv, num, width, 3 * inner, 0);
    metaseq_attend(s, qkv, qkv + own, qkv + 2 * own, l->keys, l->values, o, k->bytes);
    if (l == k->layers + k->num_layers - 1 && num_wanted < num) {
        gather(x, wanted, num_wanted, row);
        gather(o, wanted, num_wanted, own);
        num = num_wanted;
    }
    linear(k, o, now->second, k->residual ? x : 0, x, num, inner, width, 0);
    return num;
}

/* Halves of layers from one on up to another, by x [T, D] in place, and after each the sum over all ranks. Its first rows are in
 * the end those of `wanted`: the last layer goes on with no others once it has attended. `room`: for T * (D + 4 H * head width +
 * F) numbers. Gives the next half; negative where the sum before it was said and not heard. */
long metaseq_layers(const stack *k, long from, long to, char *x, char *room, const int64_t *wanted, long num_wanted) {
    long num = from == 2 * k->num_layers - 1 ? num_wanted : k->s->num_tokens;
    for (long n = from; n < to; n++) {
        num = run(k, n, x, room, num, wanted, num_wanted);
        if (k->ranks && num && !sum_over_ranks(k->ranks, x, num * k->width, k->bytes)) return -(n + 1);
    }
    return to;
}
