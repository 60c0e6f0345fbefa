/* Sums over the ranks of this machine, as `parallel.shared` has them: its memory, its order of saying and hearing. */
#include "cpu.h"

typedef struct {
    _Atomic uint64_t *words; /* of each rank a line of 64 bytes, which begins with how often it has spoken */
    char *slots;             /* [rank][2][slot] */
    uint64_t count;          /* how often this one has */
    long slot;               /* bytes */
    int rank, num_ranks, looks;
} ranks;

/* Sum x over all ranks, in place, with one rounding. 0 where one was not heard in time: it is said, and left to Python. */
int sum_over_ranks(ranks *r, char *x, long num, int bytes);
