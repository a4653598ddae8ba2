// The arithmetic rate of a machine: multiply-adds on registers alone, on several threads.
// multiply_add THREADS REPEATS: prints operations a second of each repeat; a multiplication and an addition are two.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
enum { ACCUMULATORS = 12, STEPS = 4000000, LANES = BYTES / 4 };  // enough accumulators to hide the latency of an addition

static pthread_barrier_t start, end;
static int repeats;
static volatile float factor = 0.999f, addend = 0.001f;
static volatile float sink;

static void* work(void* unused) {
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_barrier_wait(&start);
    vec sums[ACCUMULATORS];
    const vec x = factor - (vec){0}, y = addend - (vec){0};
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = y * (float)i;
    for (int step = 0; step < STEPS; ++step)
      for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = sums[i] * x + y;
    for (int i = 0; i < ACCUMULATORS; ++i) sink = sums[i][0];
    pthread_barrier_wait(&end);
  }
  return unused;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = atoi(argv[1]);
  repeats = atoi(argv[2]);
  pthread_barrier_init(&start, NULL, (unsigned)threads + 1);
  pthread_barrier_init(&end, NULL, (unsigned)threads + 1);
  for (int i = 0; i < threads; ++i) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL) != 0) return 1;
  }
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_barrier_wait(&start);
    const double begin = now();
    pthread_barrier_wait(&end);
    printf("%.6g\n", 2.0 * ACCUMULATORS * LANES * STEPS * threads / (now() - begin));
  }
  return 0;
}
