/* What an engine has on its GPU: memory, here of laprox's own pool, and a stream. */
#include <laprox/laprox.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, QUERY_HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, MODEL_DIM = 128, TOKENS = 1024, WINDOW = 32, SEGMENTS = LAYERS * KV_HEADS, ENTRIES = SEGMENTS * TOKENS };

static void check(lpx_status status, const char* what) {
  if (status == LPX_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, lpx_status_name(status), lpx_last_error());
  exit(1);
}

static float noise[1 << 20];

static void* place(lpx_device* device, const void* from, int64_t bytes) {
  void* memory = NULL;
  check(lpx_allocate(device, LPX_MEMORY_DEVICE, bytes, NULL, &memory), "lpx_allocate");
  check(lpx_copy(device, memory, from, bytes, NULL), "lpx_copy");
  return memory;
}

int main(void) {
  uint32_t state = 1;
  for (size_t i = 0; i < sizeof noise / sizeof noise[0]; i++) {
    state = state * 1664525u + 1013904223u;
    noise[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
  }
  void* stream = NULL;
  lpx_device_options engine_options = {.size = sizeof engine_options, .backend = LPX_CUDA};
  lpx_device* engine = NULL;
  check(lpx_device_open(&engine_options, &engine), "lpx_device_open");
  const int64_t rows_bytes = (int64_t)sizeof(float) * KV_HEADS * TOKENS * HEAD_DIM;
  const int64_t queries_bytes = (int64_t)sizeof(float) * QUERY_HEADS * WINDOW * HEAD_DIM;
  const int64_t projection_bytes = (int64_t)sizeof(float) * MODEL_DIM * QUERY_HEADS * HEAD_DIM;
  void* keys[LAYERS];
  void* values[LAYERS];
  void* queries[LAYERS];
  void* projections[LAYERS];
  for (int l = 0; l < LAYERS; l++) {
    keys[l] = place(engine, noise + l, rows_bytes);
    values[l] = place(engine, noise + 10 + l, rows_bytes);
    queries[l] = place(engine, noise + 20 + l, queries_bytes);
    projections[l] = place(engine, noise + 30 + l, projection_bytes);
  }
  const int32_t length = TOKENS;
  int32_t* lengths = place(engine, &length, sizeof length);
  check(lpx_synchronize(engine, NULL), "lpx_synchronize");
