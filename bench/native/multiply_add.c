// The arithmetic rate of a machine: multiply-adds on registers alone, on several threads.
// multiply_add THREADS REPEATS: prints operations a second of each repeat; a multiplication and an addition are two.
#include "together.h"

#include <stdio.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
enum { ACCUMULATORS = 12, STEPS = 4000000, LANES = BYTES / 4 };  // enough accumulators to hide the latency of an addition

static volatile float factor = 0.999f, addend = 0.001f;
static volatile float sink;

static void work(int index, int threads) {
  (void)index;
  (void)threads;
  vec sums[ACCUMULATORS];
  const vec x = factor - (vec){0}, y = addend - (vec){0};
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = y * (float)i;
  for (int step = 0; step < STEPS; ++step)
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = sums[i] * x + y;
  for (int i = 0; i < ACCUMULATORS; ++i) sink = sums[i][0];
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = atoi(argv[1]);
  const int repeats = atoi(argv[2]);
  for (int repeat = 0; repeat < repeats; ++repeat)
    printf("%.6g\n", 2.0 * ACCUMULATORS * LANES * STEPS * threads / run_together(threads, work));
  return 0;
}
