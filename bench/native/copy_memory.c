// The rate of memcpy: a block, split between several threads, from memory that no cache holds any more.
// copy_memory THREADS BYTES REPEATS FRESH: prints the seconds of each repeat. With FRESH 1 each block is copied into memory that
// the system has just given out, whose pages are touched for the first time; with 0 into memory in use.
#include "together.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { COLD = 1 << 28 };  // bytes that push everything else out of the caches

static size_t bytes;
static const char* source;
static char* target;

static void work(int index, int threads) {
  const size_t first = bytes * (size_t)index / (size_t)threads, last = bytes * ((size_t)index + 1) / (size_t)threads;
  memcpy(target + first, source + first, last - first);
}

static char* reserve(size_t size) {
  char* block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) exit(1);
  return block;
}

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int threads = atoi(argv[1]);
  bytes = strtoull(argv[2], NULL, 10);
  const int repeats = atoi(argv[3]);
  const int fresh = atoi(argv[4]);
  const size_t size = bytes > COLD ? bytes : COLD;
  char* from = reserve(size);
  char* to = reserve(size);
  memset(from, 1, size);
  memset(to, 1, size);
  size_t offset = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (offset + bytes > size) offset = 0;
    source = from + offset;
    target = fresh ? reserve(bytes) : to + offset;
    printf("%.9f\n", run_together(threads, work));
    if (fresh) munmap(target, bytes);
    offset += bytes;
  }
  return 0;
}
