// Work on several threads, and how long it takes: the calling thread is one of them, so that none stands by for the clock and takes a core from
// them, and each looks at the clock itself. Each stays on a core of its own: what wakes beside another would wait for it.
#pragma once

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

enum { MOST_THREADS = 256 };

struct share {
  void (*work)(int index, int threads);
  int index, threads;
  pthread_barrier_t* start;
  double begin, end;  // seconds
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// To the one of the cores that the process may use whose turn it is.
static void stay_on_core(int index) {
  static cpu_set_t allowed;
  static int count = 0;
  if (count == 0) {
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    count = CPU_COUNT(&allowed);
  }
  int cpu = -1;
  for (int left = index % count; left >= 0; --left) {
    do {
      ++cpu;
    } while (!CPU_ISSET(cpu, &allowed));
  }
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(cpu, &own);
  pthread_setaffinity_np(pthread_self(), sizeof own, &own);
}

static void* run_share(void* of) {
  struct share* share = of;
  stay_on_core(share->index);
  pthread_barrier_wait(share->start);
  share->begin = now();
  share->work(share->index, share->threads);
  share->end = now();
  return NULL;
}

// Seconds from the first thread's begin to the last one's end.
static double run_together(int threads, void (*work)(int index, int threads)) {
  if (threads < 1 || threads > MOST_THREADS) exit(2);
  stay_on_core(0);  // before there are others, who inherit where it may run
  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, (unsigned)threads);
  struct share shares[MOST_THREADS];
  pthread_t others[MOST_THREADS];
  for (int i = 0; i < threads; ++i) shares[i] = (struct share){work, i, threads, &start, 0, 0};
  for (int i = 1; i < threads; ++i)
    if (pthread_create(&others[i], NULL, run_share, &shares[i]) != 0) exit(1);
  run_share(&shares[0]);
  double begin = shares[0].begin, end = shares[0].end;
  for (int i = 1; i < threads; ++i) {
    pthread_join(others[i], NULL);
    if (shares[i].begin < begin) begin = shares[i].begin;
    if (shares[i].end > end) end = shares[i].end;
  }
  pthread_barrier_destroy(&start);
  return end - begin;
}
