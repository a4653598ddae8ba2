// The rate of reading memory that no cache holds: a block, split between several threads.
// read_memory THREADS REPEATS: prints bytes a second of each repeat.
#include "together.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { BYTES = 1 << 29, STREAMS = 8 };  // more than the caches hold; sums enough to hide the latency of an addition
typedef uint64_t vec __attribute__((vector_size(64)));

static const vec* block;
static volatile uint64_t sink;

static void work(int index, int threads) {
  const size_t count = BYTES / sizeof(vec) / (size_t)threads / STREAMS * STREAMS;
  const vec* first = block + (size_t)index * count;
  vec sums[STREAMS] = {{0}};
  for (size_t at = 0; at < count; at += STREAMS)
    for (int s = 0; s < STREAMS; ++s) sums[s] += first[at + (size_t)s];
  for (int s = 1; s < STREAMS; ++s) sums[0] += sums[s];
  for (int lane = 0; lane < 8; ++lane) sink = sums[0][lane];
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int threads = atoi(argv[1]);
  const int repeats = atoi(argv[2]);
  void* memory = aligned_alloc(sizeof(vec), BYTES);
  if (memory == NULL) return 1;
  memset(memory, 1, BYTES);
  block = memory;
  for (int repeat = 0; repeat < repeats; ++repeat) printf("%.6g\n", (double)BYTES / run_together(threads, work));
  return 0;
}
