// The rate of memcpy: a block, split between several threads, from memory that no cache holds any more.
// copy_memory THREADS BYTES REPEATS FRESH: prints the seconds of each repeat. With FRESH 1 each block is copied into memory that
// the system has just given out, whose pages are touched for the first time; with 0 into memory in use.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { COLD = 1 << 28 };  // bytes that push everything else out of the caches

static pthread_barrier_t start, end;
static int threads, repeats;
static size_t bytes;
static const char* source;
static char* target;

static void* work(void* index) {
  const size_t i = (size_t)index;
  const size_t first = bytes * i / (size_t)threads, last = bytes * (i + 1) / (size_t)threads;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    pthread_barrier_wait(&start);
    memcpy(target + first, source + first, last - first);
    pthread_barrier_wait(&end);
  }
  return NULL;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static char* reserve(size_t size) {
  char* block = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) exit(1);
  return block;
}

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  threads = atoi(argv[1]);
  bytes = strtoull(argv[2], NULL, 10);
  repeats = atoi(argv[3]);
  const int fresh = atoi(argv[4]);
  const size_t size = bytes > COLD ? bytes : COLD;
  char* from = reserve(size);
  char* to = reserve(size);
  memset(from, 1, size);
  memset(to, 1, size);
  pthread_barrier_init(&start, NULL, (unsigned)threads + 1);
  pthread_barrier_init(&end, NULL, (unsigned)threads + 1);
  for (size_t i = 0; i < (size_t)threads; ++i) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, (void*)i) != 0) return 1;
  }
  size_t offset = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (offset + bytes > size) offset = 0;
    source = from + offset;
    const double begin = now();
    target = fresh ? reserve(bytes) : to + offset;
    pthread_barrier_wait(&start);
    pthread_barrier_wait(&end);
    printf("%.9f\n", now() - begin);
    if (fresh) munmap(target, bytes);
    offset += bytes;
  }
  return 0;
}
