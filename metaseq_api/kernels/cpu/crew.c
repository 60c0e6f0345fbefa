/* Threads that take the pieces of a job as they finish, and whom nobody waits for that has taken none. Each begins with its own
 * pieces, which lie side by side, for memory is read faster so; who is done with these takes what others have left.
 *
 * That is why these are not OpenMP's, whose every thread must come to the end of every loop: one that stands behind another
 * program on its core holds all the others up for as long as that program's turn takes, which is milliseconds, while the
 * caller could long have done its pieces.
 *
 * One job at a time. Another caller meanwhile does its own alone.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu.h"

enum { LOOKS = 1000 }; /* before a thread sleeps: some 50 us, in which the next layer's job comes */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static do_piece *doing; /* the job's; nobody looks at these two but who has taken a piece, and then they stay */
static const void *about;
enum { PARTS = 256 };
static struct {
    _Atomic uint64_t at; /* where a thread's own pieces end, and in the lower half which is the next */
    char apart[56];
} tickets[PARTS];
static _Atomic int parts;
static _Atomic uint32_t calls, done;  /* jobs begun; pieces of the last one that are done */
static _Atomic int asleep, awaited, wanted;
static int hired;

static void wait_while(_Atomic uint32_t *at, uint32_t value) { syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, 0, 0, 0); }
static void wake(_Atomic uint32_t *at, long most) { syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, (int)most, 0, 0, 0); }

static void work_on(_Atomic uint64_t *ticket) {
    for (;;) {
        uint64_t taken = atomic_fetch_add(ticket, 1);
        if ((uint32_t)taken >= taken >> 32) return;
        doing(about, (uint32_t)taken);
        atomic_fetch_add(&done, 1);
        if (atomic_load(&awaited)) wake(&done, 1);
    }
}

static void work(long first) {
    for (long n = 0, num = atomic_load(&parts); n < num; n++) work_on(&tickets[(first + n) % num].at);
}

static void *hand(void *number) {
    uint32_t seen = 0;
    for (;;) {
        for (int i = 0; i < LOOKS && atomic_load(&calls) == seen; i++) _mm_pause();
        atomic_fetch_add(&asleep, 1);
        while (atomic_load(&calls) == seen) wait_while(&calls, seen);
        atomic_fetch_sub(&asleep, 1);
        seen = atomic_load(&calls);
        if ((long)number < atomic_load(&wanted)) work((long)number + 1);
    }
    return 0;
}

/* As many as can be had: with fewer a job takes longer, no more. They leave signals to others. */
static void hire(int num) {
    sigset_t all, before;
    pthread_t thread;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (hired < num && !pthread_create(&thread, 0, hand, (void *)(long)hired)) {
        pthread_detach(thread);
        hired++;
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
}

void share_out(long pieces, do_piece *piece, const void *job, int threads) {
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&busy)) {
        for (long n = 0; n < pieces; n++) piece(job, n);
        return;
    }
    if (hired < threads - 1) hire(threads - 1);
    doing = piece;
    about = job;
    atomic_store(&done, 0);
    atomic_store(&wanted, threads - 1);
    long num = least(threads, PARTS);
    atomic_store(&parts, num);
    for (long n = 0; n < num; n++) atomic_store(&tickets[n].at, (uint64_t)(pieces * (n + 1) / num) << 32 | pieces * n / num);
    atomic_fetch_add(&calls, 1);
    if (atomic_load(&asleep)) wake(&calls, least(threads, pieces) - 1);
    work(0);
    for (int i = 0; i < LOOKS && atomic_load(&done) < pieces; i++) _mm_pause();
    atomic_store(&awaited, 1);
    for (uint32_t so_far; (so_far = atomic_load(&done)) < pieces;) wait_while(&done, so_far);
    atomic_store(&awaited, 0);
    pthread_mutex_unlock(&busy);
}

/* Room of a thread's own, kept from piece to piece. */
void *room_for(size_t bytes) {
    static __thread void *room;
    static __thread size_t size;
    if (size < bytes) {
        free(room);
        size = (bytes + 4095) / 4096 * 4096;
        room = aligned_alloc(64, size);
    }
    return room;
}
