/* A small model, its cache and the last queries in host memory, and what docs/c-abi.md has come to before its own blocks begin. */
#include <laprox/laprox.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, QUERY_HEADS = 4, KV_HEADS = 2, HEAD_DIM = 16, MODEL_DIM = 32, TOKENS = 1024, WINDOW = 8, SEGMENTS = LAYERS * KV_HEADS, ENTRIES = SEGMENTS * TOKENS };
enum { PAGE_SIZE = 16, PAGES = 64 };

static float projection[LAYERS][MODEL_DIM][QUERY_HEADS * HEAD_DIM];
static float keys[LAYERS][KV_HEADS][TOKENS][HEAD_DIM];
static float values[LAYERS][KV_HEADS][TOKENS][HEAD_DIM];
static float queries[LAYERS][QUERY_HEADS][WINDOW][HEAD_DIM];
static int32_t tokens[ENTRIES];
static int64_t kept_offsets[SEGMENTS + 1];
static float pool_keys[PAGES][PAGE_SIZE][HEAD_DIM];
static float pool_values[PAGES][PAGE_SIZE][HEAD_DIM];
static int32_t pool_positions[PAGES][PAGE_SIZE];

static void fill(void* memory, size_t bytes) {
  static uint32_t state = 1;
  float* numbers = memory;
  for (size_t i = 0; i < bytes / sizeof(float); i++) {
    state = state * 1664525u + 1013904223u;
    numbers[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
  }
}

static void check(lpx_status status, const char* what) {
  if (status == LPX_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, lpx_status_name(status), lpx_last_error());
  exit(1);
}

static lpx_plane rows_of(float* data) {
  lpx_plane plane = {data, (int64_t)sizeof(float) * KV_HEADS * TOKENS * HEAD_DIM, 0, sizeof(float) * HEAD_DIM, sizeof(float) * TOKENS * HEAD_DIM};
  plane.page_stride = plane.bytes;
  return plane;
}

static int on_progress(void* user, int64_t done, int64_t total) {
  (void)user;
  return done > total;
}

int main(void) {
  fill(projection, sizeof projection);
  fill(keys, sizeof keys);
  fill(values, sizeof values);
  fill(queries, sizeof queries);
  lpx_device_options options = {.size = sizeof options, .threads = 2};
  lpx_device* device = NULL;
  check(lpx_device_open(&options, &device), "lpx_device_open");
  lpx_layer layers[LAYERS] = {0};
  lpx_cache_layer cache_layers[LAYERS] = {0};
  lpx_window_layer window_layers[LAYERS] = {0};
  const int32_t length = TOKENS;
  for (int l = 0; l < LAYERS; l++) {
    layers[l].projection = projection[l];
    layers[l].projection_bytes = sizeof projection[l];
    layers[l].projection_row_stride = sizeof(float);
    layers[l].projection_column_stride = sizeof(float) * QUERY_HEADS * HEAD_DIM;
    cache_layers[l].key = rows_of(&keys[l][0][0][0]);
    cache_layers[l].value = rows_of(&values[l][0][0][0]);
    cache_layers[l].page_size = TOKENS;
    cache_layers[l].pages_per_row = 1;
    cache_layers[l].lengths = &length;
    window_layers[l] = (lpx_window_layer){.queries = queries[l],
                                          .queries_bytes = sizeof queries[l],
                                          .sequence_stride = sizeof queries[l],
                                          .head_stride = sizeof queries[l][0],
                                          .row_stride = sizeof queries[l][0][0]};
  }
  lpx_model_desc desc = {sizeof desc, LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, MODEL_DIM, LPX_F32, layers};
  lpx_model* model = NULL;
  check(lpx_model_create(device, &desc, NULL, &model), "lpx_model_create");
  lpx_cache cache = {
      .size = sizeof cache, .dtype = LPX_F32, .layers = LAYERS, .sequences = 1, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .layer = cache_layers};
  lpx_window window = {.size = sizeof window, .dtype = LPX_F32, .rows = WINDOW, .layer = window_layers};
  lpx_score_rule score_rule = {.size = sizeof score_rule, .statistic = LPX_JOINT};
  lpx_select_rule select_rule = {.size = sizeof select_rule,
                                 .pooling = LPX_POOL_MAX,
                                 .pooling_width = 7,
                                 .scope = LPX_SCOPE_MODEL,
                                 .budget = LPX_BUDGET_RATIO,
                                 .ratio = 0.1,
                                 .sinks = 4,
                                 .recent = WINDOW};
