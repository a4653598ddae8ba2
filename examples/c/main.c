/*
 * Evicts three quarters of a small KV cache through the C ABI: score, select, measure, compact.
 *
 *   cmake -S . -B build && cmake --build build && cmake --install build --prefix PREFIX      (in the repository)
 *   cmake -S examples/c -B example -DCMAKE_PREFIX_PATH=PREFIX && cmake --build example && example/evict
 */
#include <laprox/laprox.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  LAYERS = 2,
  QUERY_HEADS = 4,
  KV_HEADS = 2,
  HEAD_DIM = 16,
  MODEL_DIM = 32,
  TOKENS = 96,
  WINDOW = 8,
  SEGMENTS = LAYERS * KV_HEADS, /* one sequence */
  ENTRIES = SEGMENTS * TOKENS
};

/* One layer of a model and of its cache. */
struct layer {
  float projection[MODEL_DIM][QUERY_HEADS * HEAD_DIM]; /* as o_proj.weight */
  float keys[KV_HEADS][TOKENS][HEAD_DIM];
  float values[KV_HEADS][TOKENS][HEAD_DIM];
  float queries[QUERY_HEADS][WINDOW][HEAD_DIM];
};

static struct layer layers[LAYERS];
static float scores[ENTRIES];
static int32_t tokens[ENTRIES];
static float kept_keys[ENTRIES][HEAD_DIM];
static float kept_values[ENTRIES][HEAD_DIM];
static int32_t kept_positions[ENTRIES];

/* Numbers in [-1, 1) that are the same everywhere. */
static float next_number(void) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static void fill(float* numbers, size_t count) {
  for (size_t i = 0; i < count; i++) numbers[i] = next_number();
}

static void check(lpx_status status, const char* what) {
  if (status == LPX_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, lpx_status_name(status), lpx_last_error());
  exit(1);
}

static void expect(int condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "expected %s\n", what);
  exit(1);
}

/* A plane of [heads][TOKENS][HEAD_DIM] floats. */
static lpx_plane plane_of(float* data) {
  lpx_plane plane = {0};
  plane.data = data;
  plane.bytes = (int64_t)sizeof(float) * KV_HEADS * TOKENS * HEAD_DIM;
  plane.token_stride = sizeof(float) * HEAD_DIM;
  plane.head_stride = sizeof(float) * TOKENS * HEAD_DIM;
  plane.page_stride = plane.bytes;
  return plane;
}

int main(void) {
  expect(lpx_abi_version() == LAPROX_ABI_VERSION, "a library of the header's version");

  /* A device and a model. */
  lpx_device_options device_options = {.size = sizeof device_options, .backend = LPX_CPU, .threads = 2};
  lpx_device* device = NULL;
  check(lpx_device_open(&device_options, &device), "lpx_device_open");
  lpx_device_info device_info = {.size = sizeof device_info};
  check(lpx_get_device_info(device, &device_info), "lpx_get_device_info");

  lpx_layer model_layers[LAYERS] = {0};
  lpx_cache_layer cache_layers[LAYERS] = {0};
  lpx_window_layer window_layers[LAYERS] = {0};
  const int32_t length = TOKENS;
  for (int l = 0; l < LAYERS; l++) {
    struct layer* layer = &layers[l];
    fill(&layer->projection[0][0], sizeof layer->projection / sizeof(float));
    fill(&layer->keys[0][0][0], sizeof layer->keys / sizeof(float));
    fill(&layer->values[0][0][0], sizeof layer->values / sizeof(float));
    fill(&layer->queries[0][0][0], sizeof layer->queries / sizeof(float));

    model_layers[l].projection = layer->projection;
    model_layers[l].projection_bytes = sizeof layer->projection;
    model_layers[l].projection_row_stride = sizeof(float);
    model_layers[l].projection_column_stride = sizeof(float) * QUERY_HEADS * HEAD_DIM;

    cache_layers[l].key = plane_of(&layer->keys[0][0][0]);
    cache_layers[l].value = plane_of(&layer->values[0][0][0]);
    cache_layers[l].page_size = TOKENS;
    cache_layers[l].pages_per_row = 1;
    cache_layers[l].lengths = &length;

    window_layers[l].queries = layer->queries;
    window_layers[l].queries_bytes = sizeof layer->queries;
    window_layers[l].sequence_stride = sizeof layer->queries;
    window_layers[l].head_stride = sizeof(float) * WINDOW * HEAD_DIM;
    window_layers[l].row_stride = sizeof(float) * HEAD_DIM;
  }

  lpx_model_desc model_desc = {.size = sizeof model_desc,
                               .layers = LAYERS,
                               .query_heads = QUERY_HEADS,
                               .kv_heads = KV_HEADS,
                               .head_dim = HEAD_DIM,
                               .model_dim = MODEL_DIM,
                               .projection_dtype = LPX_F32,
                               .layer = model_layers};
  lpx_model* model = NULL;
  check(lpx_model_create(device, &model_desc, NULL, &model), "lpx_model_create");

  /* The score of every entry. */
  lpx_cache cache = {
      .size = sizeof cache, .dtype = LPX_F32, .layers = LAYERS, .sequences = 1, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .layer = cache_layers};
  lpx_window window = {.size = sizeof window, .dtype = LPX_F32, .rows = WINDOW, .layer = window_layers};
  int64_t offsets[SEGMENTS];
  int32_t lengths[SEGMENTS];
  int64_t total = 0;
  check(lpx_score_layout(&cache, offsets, lengths, &total), "lpx_score_layout");
  expect(total == ENTRIES, "a score for each entry");

  lpx_score_rule score_rule = {.size = sizeof score_rule, .statistic = LPX_JOINT};
  lpx_scores table = {.size = sizeof table,
                      .layers = LAYERS,
                      .sequences = 1,
                      .kv_heads = KV_HEADS,
                      .data = scores,
                      .count = total,
                      .offsets = offsets,
                      .lengths = lengths,
                      .bytes_per_entry = 2 * sizeof(float) * HEAD_DIM};
  check(lpx_score(model, &cache, &window, &score_rule, &table, NULL), "lpx_score");
  for (int i = 0; i < ENTRIES; i++) expect(isfinite(scores[i]) && scores[i] >= 0, "scores that are finite");

  /* The best quarter, over all layers and heads at once. */
  lpx_select_rule select_rule = {.size = sizeof select_rule,
                                 .pooling = LPX_POOL_MAX,
                                 .pooling_width = 3,
                                 .scope = LPX_SCOPE_MODEL,
                                 .budget = LPX_BUDGET_RATIO,
                                 .ratio = 0.25,
                                 .sinks = 4,
                                 .recent = WINDOW};
  int64_t kept_offsets[SEGMENTS + 1];
  lpx_selection selection = {.size = sizeof selection, .tokens = tokens, .capacity = ENTRIES, .offsets = kept_offsets};
  lpx_report report = {.size = sizeof report};
  check(lpx_select(device, &table, &select_rule, &selection, &report, NULL), "lpx_select");
  expect(report.kept == ENTRIES / 4, "a quarter of the entries");

  /* How far the layers' outputs move without the rest: squares of the change and of the output. */
  double squares[LAYERS][2];
  check(lpx_fidelity(model, &cache, &window, 0, &selection, &squares[0][0], NULL), "lpx_fidelity");
  for (int l = 0; l < LAYERS; l++) printf("layer %d moves by %.0f %%\n", l, 100 * sqrt(squares[l][0] / squares[l][1]));

  /* Their rows, one after the other. */
  lpx_cache_layer target = {0};
  target.key = (lpx_plane){kept_keys, sizeof kept_keys, sizeof kept_keys[0], sizeof kept_keys[0], 0};
  target.value = (lpx_plane){kept_values, sizeof kept_values, sizeof kept_values[0], sizeof kept_values[0], 0};
  target.position = (lpx_plane){kept_positions, sizeof kept_positions, sizeof(int32_t), sizeof(int32_t), 0};
  target.page_size = ENTRIES;
  target.pages_per_row = 1;
  int32_t kept_lengths[SEGMENTS];
  lpx_compaction compaction = {.size = sizeof compaction, .target = LPX_TO_RAGGED, .layer = &target, .layers = 1, .lengths = kept_lengths};
  check(lpx_compact(device, &cache, &selection, &compaction, NULL), "lpx_compact");

  printf("laprox %s kept %lld of %lld entries (%lld of them protected)\n", lpx_version(), (long long)report.kept, (long long)report.entries,
         (long long)report.protected_entries);
  for (int l = 0; l < LAYERS; l++) {
    for (int g = 0; g < KV_HEADS; g++) {
      const int segment = l * KV_HEADS + g;
      printf("layer %d head %d:", l, g);
      for (int64_t e = kept_offsets[segment]; e < kept_offsets[segment + 1]; e++) {
        const int32_t token = tokens[e];
        printf(" %d", token);
        expect(kept_positions[e] == token, "the original position of each kept row");
        expect(memcmp(kept_keys[e], layers[l].keys[g][token], sizeof kept_keys[e]) == 0, "the key of each kept row");
        expect(memcmp(kept_values[e], layers[l].values[g][token], sizeof kept_values[e]) == 0, "the value of each kept row");
      }
      printf("\n");
      expect(kept_lengths[segment] == kept_offsets[segment + 1] - kept_offsets[segment], "lengths that match the selection");
    }
  }

  /* From queries to kept rows in one call, which computes few exact scores. */
  static int32_t tokens_again[ENTRIES];
  int64_t offsets_again[SEGMENTS + 1];
  const lpx_selection again = {.size = sizeof again, .tokens = tokens_again, .capacity = ENTRIES, .offsets = offsets_again};
  memset(kept_keys, 0, sizeof kept_keys);
  int64_t scratch_bytes = 0;
  check(lpx_evict_workspace(model, &cache, &window, &score_rule, &select_rule, &compaction, &scratch_bytes), "lpx_evict_workspace");
  expect(scratch_bytes > 0, "an eviction to need scratch memory");
  void* scratch = aligned_alloc(64, (size_t)(scratch_bytes + 63) / 64 * 64);
  const lpx_call call = {.size = sizeof call, .workspace = scratch, .workspace_bytes = scratch_bytes};
  check(lpx_evict(model, &cache, &window, &score_rule, &select_rule, &again, &report, &compaction, &call), "lpx_evict");
  free(scratch);
  printf("lpx_evict computed %lld of %lld scores\n", (long long)report.exact_scores, (long long)report.entries);
  expect(memcmp(offsets_again, kept_offsets, sizeof kept_offsets) == 0, "an eviction to keep as many of each head");
  expect(memcmp(tokens_again, tokens, (size_t)report.kept * sizeof tokens[0]) == 0, "an eviction to keep the same tokens");
  expect(memcmp(kept_keys[0], layers[0].keys[0][tokens[0]], sizeof kept_keys[0]) == 0, "an eviction to move the rows");

  /* A call that cannot succeed says why, and changes nothing. */
  select_rule.ratio = 1.5;
  const lpx_status status = lpx_select(device, &table, &select_rule, &selection, NULL, NULL);
  expect(status == LPX_INVALID_ARGUMENT, "a ratio of 1.5 to be refused");
  printf("a ratio of 1.5: %s: %s\n", lpx_status_name(status), lpx_last_error());

  lpx_model_destroy(model);
  lpx_device_close(device);
  return 0;
}
