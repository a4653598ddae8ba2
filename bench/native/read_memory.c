// The rate of reading memory that no cache holds: a block, split between several threads.
// read_memory THREADS REPEATS: prints bytes a second of each repeat.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BYTES = 1 << 29, STREAMS = 8 };  // more than the caches hold; sums enough to hide the latency of an addition
typedef uint64_t vec __attribute__((vector_size(64)));

static pthread_barrier_t start, end;
static int threads, repeats;
static const vec* block;
static volatile uint64_t sink;

static void* work(void* index) {
  const size_t i = (size_t)index, count = BYTES / sizeof(vec) / (size_t)threads / STREAMS * STREAMS;
  const vec* first = block + i * count;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_barrier_wait(&start);
    vec sums[STREAMS] = {{0}};
    for (size_t at = 0; at < count; at += STREAMS)
      for (int s = 0; s < STREAMS; ++s) sums[s] += first[at + (size_t)s];
    for (int s = 1; s < STREAMS; ++s) sums[0] += sums[s];
    for (int lane = 0; lane < 8; ++lane) sink = sums[0][lane];
    pthread_barrier_wait(&end);
  }
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  threads = atoi(argv[1]);
  repeats = atoi(argv[2]);
  void* memory = aligned_alloc(sizeof(vec), BYTES);
  if (memory == NULL) return 1;
  memset(memory, 1, BYTES);
  block = memory;
  pthread_barrier_init(&start, NULL, (unsigned)threads + 1);
  pthread_barrier_init(&end, NULL, (unsigned)threads + 1);
  for (size_t i = 0; i < (size_t)threads; ++i) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void*)i) != 0) return 1;
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_barrier_wait(&start);
    const double begin = now();
    pthread_barrier_wait(&end);
    printf("%.6g\n", (double)BYTES / (now() - begin));
  }
  return 0;
}
