/*
 * laprox: KV-cache eviction by what each entry contributes to the model's output.
 *
 * This is the only door to the core. It is plain C11, and everything laprox computes is reachable from it.
 *
 * Conventions
 *  - Every struct that a caller fills begins with `size`, set to sizeof of the struct: it carries the version. Zero the
 *    rest: zero is the default of every field.
 *  - Every function that can fail returns an lpx_status and leaves a sentence in lpx_last_error() of the calling thread.
 *    A call that fails leaves every cache as it was; the contents of pure outputs are unspecified then.
 *  - Strides are in bytes, offsets are 64-bit, token indices and lengths are int32.
 *  - Tensors are described by the pointer to their first element, the bytes that may be touched from there, and strides.
 *    On a CPU device all pointers are host pointers.
 *  - On a CUDA device the structs themselves, arrays of structs, layer weights, sink logits and pinned ranges are host memory.
 *    Everything else that a pointer leads to is memory that the device can read: planes, queries, log-sum-exp, page tables,
 *    lengths, context lengths, projections, scores, selections, what a compaction writes, and the report. Rows of keys,
 *    values and queries begin at multiples of 16 bytes. Calls check what the host can see, enqueue their work on the call's
 *    stream and return; what only the device can see (lengths, page ids, scores, budgets) it checks there, see lpx_call.
 *    Nothing synchronises but lpx_device_open, lpx_device_close, lpx_model_create and lpx_synchronize.
 *  - A *segment* is one (layer, sequence, KV head). Segments are numbered (layer * sequences + sequence) * kv_heads + head.
 *  - Calls on different devices may run at the same time; calls on one CPU device from several threads take turns.
 */
#ifndef LAPROX_H
#define LAPROX_H

#include <stddef.h>
#include <stdint.h>

#define LAPROX_ABI_VERSION 3

#if defined(_WIN32)
#define LAPROX_API __declspec(dllexport)
#else
#define LAPROX_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------- status */

typedef enum lpx_status {
  LPX_OK = 0,
  LPX_INVALID_ARGUMENT = 1, /* a value, shape, dtype or pointer that cannot be */
  LPX_OUT_OF_BOUNDS = 2,    /* strides, page ids or lengths that leave their buffer */
  LPX_OVERLAP = 3,          /* outputs that overlap each other or an input */
  LPX_BUDGET_TOO_SMALL = 4, /* the budget is below what is protected */
  LPX_NON_FINITE = 5,       /* NaN or infinity among the scores or projections */
  LPX_OUT_OF_MEMORY = 6,    /* the host or the device has no memory left, or the workspace is too small */
  LPX_OUT_OF_PAGES = 7,     /* the free list is shorter than the pages needed */
  LPX_CANCELLED = 8,        /* the progress callback asked to stop */
  LPX_UNSUPPORTED = 9,      /* the backend does not do this */
  LPX_NO_DEVICE = 10,       /* the backend is not available; lpx_backend_info says why */
  LPX_DEVICE_ERROR = 11,    /* the device failed; the message has its name for the error */
  LPX_INTERNAL = 12         /* a defect of laprox: please report it */
} lpx_status;

/* The sentence for the last failure on this thread; empty after none. Valid until the next call on this thread. */
LAPROX_API const char* lpx_last_error(void);
/* "INVALID_ARGUMENT" and so on: stable names. */
LAPROX_API const char* lpx_status_name(lpx_status status);
/* LAPROX_ABI_VERSION of the library that was loaded, and the release ("0.1.0"). */
LAPROX_API uint32_t lpx_abi_version(void);
LAPROX_API const char* lpx_version(void);

/* ---------------------------------------------------------------- devices */

typedef enum lpx_backend { LPX_CPU = 0, LPX_CUDA = 1 } lpx_backend;

/* The vector instructions of a CPU device. AUTO is the best that the machine has; asking for one it lacks is UNSUPPORTED. */
typedef enum lpx_isa {
  LPX_ISA_AUTO = 0,
  LPX_ISA_BASELINE = 1,  /* SSE2 on x86-64, NEON on arm64 */
  LPX_ISA_AVX2 = 2,      /* with FMA and F16C */
  LPX_ISA_AVX512 = 3,    /* F, BW, DQ, VL */
  LPX_ISA_AMX = 4,       /* AVX-512 with AMX-BF16, on Linux: the process asks for the right to use tiles, once and for all its threads */
  LPX_ISA_AVX512BF16 = 5 /* AVX-512 with BF16; AUTO takes it on AMD's processors, where it is faster */
} lpx_isa;

/* Which kernels a CUDA device uses: for tests and comparisons. Asking for those of another chip is UNSUPPORTED. */
typedef enum lpx_kernels {
  LPX_KERNELS_AUTO = 0,
  LPX_KERNELS_PLAIN = 1,    /* any shape, any chip */
  LPX_KERNELS_PORTABLE = 2, /* compute capability 8.0 and newer */
  LPX_KERNELS_HOPPER = 3    /* compute capability 9.0 */
} lpx_kernels;

typedef struct lpx_backend_info {
  size_t size;
  int32_t available;    /* 1 or 0 */
  int32_t device_count; /* devices of this backend */
  char code[32];        /* "" where available, else NOT_BUILT, NO_DRIVER, DRIVER_TOO_OLD, NO_DEVICE or ABI_MISMATCH */
  char reason[256];     /* a sentence, where not available */
} lpx_backend_info;

/* Lack of a device is data, not an error: this fails only for a backend that does not exist. */
LAPROX_API lpx_status lpx_get_backend_info(lpx_backend backend, lpx_backend_info* info);

typedef struct lpx_device lpx_device;

typedef struct lpx_device_options {
  size_t size;
  lpx_backend backend;
  int32_t index;       /* which CUDA device; 0 for the CPU */
  int32_t threads;     /* CPU: worker threads, 0 for one a core. Results do not depend on it. */
  lpx_isa isa;         /* CPU */
  lpx_kernels kernels; /* CUDA */
} lpx_device_options;

typedef struct lpx_device_info {
  size_t size;
  lpx_backend backend;
  int32_t index;
  int32_t threads;
  char name[128];       /* "CPU", or the GPU's name */
  char isa[16];         /* "baseline", "avx2", "avx512", "amx", "avx512bf16"; "sm_90" and so on */
  int64_t memory_bytes; /* of the device; 0 where unknown */
} lpx_device_info;

LAPROX_API lpx_status lpx_device_open(const lpx_device_options* options, lpx_device** device);
/* Waits for calls under way. Models keep what they need of the device: they may be destroyed later. */
LAPROX_API void lpx_device_close(lpx_device* device);
LAPROX_API lpx_status lpx_get_device_info(const lpx_device* device, lpx_device_info* info);

/* ---------------------------------------------------------------- calls */

/*
 * Called now and then from any thread of the device, never twice at a time within a call: `done` of `total` units of work.
 * Returning non-zero ends the call with LPX_CANCELLED, within some milliseconds.
 */
typedef int (*lpx_progress)(void* user, int64_t done, int64_t total);

typedef struct lpx_call {
  size_t size;
  void* stream;            /* CUDA: the cudaStream_t everything is enqueued on; NULL: the device's own. CPU: ignored, calls return when done. */
  void* workspace;         /* scratch aligned to 64 bytes (CUDA: 256), or NULL: laprox takes it from its own pool */
  int64_t workspace_bytes; /* at least what the matching lpx_*_workspace function says */
  lpx_progress progress;   /* CPU, or NULL */
  void* user;
  /*
   * CUDA, or NULL: memory of the device that holds an lpx_status, LPX_OK before the first of a chain of calls. The first wrong
   * thing that the device finds is left there, and every later call that is given the same status does nothing: its
   * selection is empty, its compaction moves no row.
   */
  int32_t* status;
} lpx_call;

/* ---------------------------------------------------------------- memory and streams */

typedef enum lpx_memory {
  LPX_MEMORY_DEVICE = 0, /* of the device, from laprox's pool, in the order of the stream */
  LPX_MEMORY_HOST = 1    /* page-locked host memory that the device can read and write */
} lpx_memory;

/* Aligned to 256 bytes. OUT_OF_MEMORY where there is none. On a CPU device streams are ignored, and all of it is host memory. */
LAPROX_API lpx_status lpx_allocate(lpx_device* device, lpx_memory kind, int64_t bytes, void* stream, void** memory);
/* NULL is ignored. Device memory goes back when the stream gets there; host memory at once: nothing may be using it. */
LAPROX_API void lpx_free(lpx_device* device, lpx_memory kind, void* memory, void* stream);
/* From and to either kind of memory. Asynchronous; host memory that is not page-locked is staged before the call returns. */
LAPROX_API lpx_status lpx_copy(lpx_device* device, void* to, const void* from, int64_t bytes, void* stream);
LAPROX_API lpx_status lpx_fill(lpx_device* device, void* memory, int value, int64_t bytes, void* stream);

/* Calls `done` on a thread of the driver once everything before it in the stream has ended. It must not call laprox or CUDA. */
typedef void (*lpx_done)(void* user);
LAPROX_API lpx_status lpx_notify(lpx_device* device, void* stream, lpx_done done, void* user);
/* Lets a stream wait for a cudaEvent_t of the caller, records one, waits for a stream. */
LAPROX_API lpx_status lpx_wait_event(lpx_device* device, void* stream, void* event);
LAPROX_API lpx_status lpx_record_event(lpx_device* device, void* stream, void* event);
/* DEVICE_ERROR where something on the stream has failed. */
LAPROX_API lpx_status lpx_synchronize(lpx_device* device, void* stream);
/* Whether the device can still be used: DEVICE_ERROR, with CUDA's name for it, once an error has made the context unusable. Waits for nothing. */
LAPROX_API lpx_status lpx_check_device(lpx_device* device);

/* ---------------------------------------------------------------- tensors */

typedef enum lpx_dtype { LPX_F32 = 0, LPX_F16 = 1, LPX_BF16 = 2 } lpx_dtype;

/* ---------------------------------------------------------------- the model */

typedef struct lpx_layer {
  /*
   * The output projection W_O. The weight that takes feature i of query head h to model column c is at
   * (h * head_dim + i) * projection_row_stride + c * projection_column_stride. An o_proj.weight [D, H*d] of PyTorch has
   * row stride = element size, column stride = H*d*element size. NULL: none, and scores that need it are UNSUPPORTED.
   */
  const void* projection;
  int64_t projection_bytes;
  int64_t projection_row_stride;
  int64_t projection_column_stride;
  float scale;              /* of the logits; 0 means 1/sqrt(head_dim) */
  float soft_cap;           /* logit = cap * tanh(logit / cap); 0: none */
  int32_t sliding_window;   /* a query sees this many tokens, its own included; 0: all */
  const float* sink_logits; /* [query_heads] host, one extra logit in each softmax; NULL: none */
} lpx_layer;

typedef struct lpx_model_desc {
  size_t size;
  int32_t layers;
  int32_t query_heads; /* H: a multiple of kv_heads */
  int32_t kv_heads;    /* G */
  int32_t head_dim;    /* d: a multiple of 8 up to 256 */
  int32_t model_dim;   /* D: columns of the output projection; 0 where no layer has one */
  lpx_dtype projection_dtype;
  const lpx_layer* layer; /* [layers] */
} lpx_model_desc;

typedef struct lpx_model lpx_model;

/*
 * Computes, for each (layer, KV head), the block-triangular factor of its stacked W_h slices and an upper bound of the
 * largest singular value of each slice. Costs D * (R*d)^2 multiply-adds a KV head. On a CPU device the projections stay where
 * they are and must stay readable while the model lives (projected l1 norms and lpx_fidelity read them); on a CUDA device they
 * are only read here. NON_FINITE where a weight is not finite.
 */
LAPROX_API lpx_status lpx_model_create(lpx_device* device, const lpx_model_desc* desc, const lpx_call* call, lpx_model** model);
LAPROX_API void lpx_model_destroy(lpx_model* model);

/* ---------------------------------------------------------------- caches */

/*
 * One kind of row in a cache: the row of (page, slot, head) starts at
 *   data + page * page_stride + slot * token_stride + head * head_stride.
 * Key and value rows hold head_dim elements, contiguous. Position rows hold one int32, value-norm rows one float.
 */
typedef struct lpx_plane {
  void* data;    /* NULL: absent */
  int64_t bytes; /* that may be touched from data */
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
} lpx_plane;

/*
 * One layer of a cache. Token t of (sequence, head) lies in slot t % page_size of page
 *   page_table[sequence * table_sequence_stride + head * table_head_stride + t / page_size]   (strides in elements).
 * One description serves every layout:
 *   contiguous   page_table NULL: the page is the sequence; page_size = capacity
 *   paged        a table shared by the heads (table_head_stride 0) or per head
 *   ragged       flat rows [total, d]: page_stride = token_stride, head_stride 0, page_size = capacity, and a one-page table
 *                per (sequence, head) that holds its first row
 */
typedef struct lpx_cache_layer {
  lpx_plane key;
  lpx_plane value;
  lpx_plane position;   /* original positions, ascending along a segment; absent: the position of token t is t */
  lpx_plane value_norm; /* ||v||_2 of each row, kept by the caller; absent: computed when needed */
  int32_t page_size;
  int32_t pages_per_row; /* table entries a (sequence, head) has; 1 without a table */
  const int32_t* page_table;
  int64_t table_sequence_stride;
  int64_t table_head_stride;
  const int32_t* lengths; /* tokens of (sequence, head) at sequence * length_sequence_stride + head * length_head_stride */
  int64_t length_sequence_stride;
  int64_t length_head_stride; /* 0: all heads of a sequence are equally long */
} lpx_cache_layer;

typedef struct lpx_cache {
  size_t size;
  lpx_dtype dtype;
  int32_t layers;
  int32_t sequences;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t max_length;             /* CUDA: an upper bound of every length, which sizes workspaces and grids; CPU: ignored */
  const int32_t* context_lengths; /* [sequences] tokens read so far. Required with positions, ignored without. */
  const lpx_cache_layer* layer;   /* [layers] */
} lpx_cache;

/* ---------------------------------------------------------------- the observation window */

typedef enum lpx_lse_base { LPX_NATURAL = 0, LPX_BASE_2 = 1 } lpx_lse_base;

/* Queries [sequence, query head, row, d], rotated like the keys; log-sum-exp [sequence, query head, row] float. */
typedef struct lpx_window_layer {
  const void* queries;
  int64_t queries_bytes;
  int64_t sequence_stride;
  int64_t head_stride;
  int64_t row_stride;
  const float* lse; /* of the layer's logits (after scale, soft-cap, mask, sink) over the whole context; NULL: computed */
  int64_t lse_bytes;
  int64_t lse_sequence_stride;
  int64_t lse_head_stride;
  int64_t lse_row_stride;
} lpx_window_layer;

/*
 * Writes ||v||_2 of every row into the value_norm planes of all layers, which must be there: what keeps an eviction from
 * reading V. Rows that are appended later need theirs written too: describe them alone, as a cache of their own.
 */
LAPROX_API lpx_status lpx_value_norms(lpx_device* device, const lpx_cache* cache, const lpx_call* call);

/*
 * The last `rows` queries. Row r of a segment of n tokens stands at position n - rows + r (with positions in the cache:
 * context_length - rows + r) and sees tokens up to its own position; rows with a negative position do not exist.
 */
typedef struct lpx_window {
  size_t size;
  lpx_dtype dtype;
  int32_t rows; /* m: 1 to 128 */
  lpx_lse_base lse_base;
  const lpx_window_layer* layer; /* [layers] */
} lpx_window;

/* ---------------------------------------------------------------- scores */

typedef enum lpx_statistic {
  LPX_JOINT = 0,    /* || sum over the group of a_h (x) v W_h ||_F: the paper's idea, exact across the group */
  LPX_BOUND = 1,    /* sum over the group of ||a_h|| ||v W_h||: an upper bound of JOINT */
  LPX_REMOVAL = 2,  /* the exact change of the layer's output when the entry goes and the softmax renormalises */
  LPX_FACTORED = 3, /* aggregate(attention statistic) * aggregate(value statistic): the grid of the peers */
  LPX_KEY_NORM = 4, /* -||k||_2 */
  LPX_RECENCY = 5,  /* the position */
  LPX_RANDOM = 6    /* uniform in [0, 1), a function of seed, layer, head and position */
} lpx_statistic;

/* Over the rows of the window. */
typedef enum lpx_attention_statistic {
  LPX_ATTENTION_MEAN = 0, /* over the rows that exist */
  LPX_ATTENTION_SUM = 1,
  LPX_ATTENTION_L2 = 2,
  LPX_ATTENTION_MAX = 3,
  LPX_ATTENTION_LAST = 4, /* the last row */
  LPX_ATTENTION_NONE = 5  /* 1 */
} lpx_attention_statistic;

typedef enum lpx_value_statistic {
  LPX_VALUE_NONE = 0, /* 1 */
  LPX_VALUE_L1 = 1,   /* ||v||_1 */
  LPX_VALUE_L2 = 2,
  LPX_VALUE_PROJECTED_L1 = 3, /* ||v W_h||_1 */
  LPX_VALUE_PROJECTED_L2 = 4
} lpx_value_statistic;

/* Over the query heads of the group. */
typedef enum lpx_aggregation {
  LPX_AGGREGATE_MEAN = 0,
  LPX_AGGREGATE_SUM = 1,
  LPX_AGGREGATE_MAX = 2,
  LPX_AGGREGATE_RSS = 3 /* root of the sum of squares */
} lpx_aggregation;

/* LAYER: the attention statistic is aggregated over all query heads of the layer, and its KV heads share one score (TOVA). */
typedef enum lpx_sharing { LPX_SHARE_GROUP = 0, LPX_SHARE_LAYER = 1 } lpx_sharing;

typedef struct lpx_score_rule {
  size_t size;
  lpx_statistic statistic;
  lpx_attention_statistic attention; /* the next four: FACTORED only */
  lpx_value_statistic value;
  lpx_aggregation aggregation;
  lpx_sharing sharing;
  uint64_t seed;              /* RANDOM */
  const float* layer_weights; /* [layers] multiply the scores, host; NULL: 1 */
} lpx_score_rule;

/*
 * Scores of all segments. Segment x has lengths[x] scores from data + offsets[x]; offsets ascend and segments do not overlap.
 * lpx_score_layout fills lengths and packed offsets for a cache.
 * CUDA: scores lie [segments, count / segments]; offsets are NULL, and the scores of a segment, count / segments of them at
 * most, begin at a multiple of 4. lpx_score ignores lengths and writes positions where they are not NULL; lpx_select reads
 * both on the device.
 */
typedef struct lpx_scores {
  size_t size;
  int32_t layers;
  int32_t sequences;
  int32_t kv_heads;
  float* data;
  int64_t count;                  /* floats that may be touched from data */
  const int64_t* offsets;         /* [segments] */
  const int32_t* lengths;         /* [segments] */
  int32_t* positions;             /* original position of each score, laid out as data; NULL: the index in the segment */
  const int32_t* context_lengths; /* [sequences], required with positions */
  int64_t bytes_per_entry;        /* of one key and one value row: for budgets in bytes */
} lpx_scores;

/* lengths and offsets [segments]; total = sum of lengths. Checks the cache as every call does. For host memory only. */
LAPROX_API lpx_status lpx_score_layout(const lpx_cache* cache, int64_t* offsets, int32_t* lengths, int64_t* total);

LAPROX_API lpx_status lpx_score_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule,
                                          int64_t* bytes);
/* `window` may be NULL for rules that look at no query. Not pooled: pooling belongs to the selection. */
LAPROX_API lpx_status lpx_score(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, const lpx_scores* out,
                                const lpx_call* call);

/* ---------------------------------------------------------------- selection */

typedef enum lpx_pooling { LPX_POOL_NONE = 0, LPX_POOL_MAX = 1, LPX_POOL_MEAN = 2 } lpx_pooling;
typedef enum lpx_scope { LPX_SCOPE_MODEL = 0, LPX_SCOPE_LAYER = 1, LPX_SCOPE_HEAD = 2 } lpx_scope;
typedef enum lpx_budget { LPX_BUDGET_RATIO = 0, LPX_BUDGET_ENTRIES = 1, LPX_BUDGET_BYTES = 2 } lpx_budget;
typedef enum lpx_non_finite { LPX_NON_FINITE_ERROR = 0, LPX_NON_FINITE_KEEP = 1 } lpx_non_finite;

typedef struct lpx_range {
  int32_t begin; /* positions [begin, end) */
  int32_t end;
} lpx_range;

/*
 * What is kept of each sequence.
 *  - ratio: floor(ratio * entries) of each part (the sequence; a layer of it; a head of a layer), 0 < ratio <= 1.
 *  - entries, bytes: of the whole sequence; parts get their share by length, the remainder going to the largest fractions,
 *    then to the smaller (layer, head). More than there is keeps all.
 *  - Protected entries (the first `sinks` positions, the last `recent`, pinned ranges) are kept and count towards the
 *    budget of their part; a part whose budget is below its protected entries is BUDGET_TOO_SMALL.
 *  - floor f: each head of a part first keeps its best floor(f * (budget - protected) / heads) unprotected entries.
 *  - Ties: the smaller (layer, head, token) is kept.
 */
typedef struct lpx_select_rule {
  size_t size;
  lpx_pooling pooling;   /* over neighbouring tokens of a head, protected ones included, truncated at the ends */
  int32_t pooling_width; /* odd, 1 to 255 */
  lpx_scope scope;
  lpx_budget budget;
  double ratio;        /* RATIO */
  int64_t amount;      /* ENTRIES or BYTES */
  double floor;        /* 0 to 1 */
  double pyramid_beta; /* HEAD scope: layer budgets fall linearly (PyramidKV), steeper with beta; 0: even */
  int32_t sinks;
  int32_t recent;
  const lpx_range* pinned; /* [pinned_count] host */
  int32_t pinned_count;
  lpx_non_finite non_finite;
  int32_t exhaustive; /* straight from a cache: 1 computes every exact score, though bounds may rule most out; the same is kept */
} lpx_select_rule;

/* Kept tokens of segment x, ascending: tokens[offsets[x] .. offsets[x + 1]). CUDA: all offsets are 0 after an error that the device found. */
typedef struct lpx_selection {
  size_t size;
  int32_t* tokens;
  int64_t capacity; /* of tokens: at least the sum of lpx_kept_counts */
  int64_t* offsets; /* [segments + 1] */
} lpx_selection;

typedef enum lpx_path { LPX_PATH_FULL = 0, LPX_PATH_PRUNED = 1 } lpx_path;

typedef struct lpx_report {
  size_t size;
  int64_t entries;
  int64_t kept;
  int64_t protected_entries;
  int64_t non_finite;
  lpx_path path;
  int64_t candidates;   /* entries that the scan's bounds could not rule out; all entries on the full path */
  int64_t exact_scores; /* entries whose exact score was computed; for others bounds or estimates did */
  char fallback[64];    /* why the full path ran where pruning was possible; "" otherwise */
  double score_seconds;
  double select_seconds;
} lpx_report;

/*
 * How many entries of each sequence a rule keeps: known before any score is. kept [sequences]. Only sizes, lengths, offsets and
 * positions of the scores are read, from host memory: a caller that has a device's lengths on the host too can ask.
 */
LAPROX_API lpx_status lpx_kept_counts(const lpx_scores* scores, const lpx_select_rule* rule, int64_t* kept);

LAPROX_API lpx_status lpx_select_workspace(const lpx_device* device, const lpx_scores* scores, const lpx_select_rule* rule, int64_t* bytes);
/* report may be NULL. CUDA: memory of the device (or of LPX_MEMORY_HOST), complete when the stream gets there; its seconds are 0. */
LAPROX_API lpx_status lpx_select(lpx_device* device, const lpx_scores* scores, const lpx_select_rule* rule, const lpx_selection* out,
                                 lpx_report* report, const lpx_call* call);

/*
 * The selection straight from a cache: what lpx_score and lpx_select give, to the bit, but computing few exact scores where
 * bounds prove that the others cannot be kept.
 */
LAPROX_API lpx_status lpx_select_cache_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window,
                                                 const lpx_score_rule* score_rule, const lpx_select_rule* select_rule, int64_t* bytes);
LAPROX_API lpx_status lpx_select_cache(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                       const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call* call);

/* ---------------------------------------------------------------- fidelity */

/*
 * How far the layers' outputs move where only a selection is kept: for each layer, over all sequences and the rows of `window`,
 *   out[2 * layer]     = || O_kept - O ||_F^2
 *   out[2 * layer + 1] = || O ||_F^2
 * with O = sum over query heads of a_h V W_h the output of attention over the cache as it is, and O_kept that of attention over
 * the kept tokens alone: each softmax is over the tokens its query sees, and the layer's sink logit. A query that sees no token has
 * the output 0.
 *
 * `ahead` is how far behind the last token that was read the last row of the window stands: row r is at position
 * n + ahead - rows + r. 0 is the observation window; k, with k rows, are the k queries that come next. What those see of tokens
 * that are no longer, or not yet, in the cache is in neither output. A log-sum-exp of the window is not needed, and not read.
 *
 * UNSUPPORTED for models of a CUDA device, and where a layer has no projection; NON_FINITE where an output is not finite. CPU
 * devices read the projections where the caller keeps them.
 */
LAPROX_API lpx_status lpx_fidelity_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, int32_t ahead,
                                             const lpx_selection* selection, int64_t* bytes);
LAPROX_API lpx_status lpx_fidelity(lpx_model* model, const lpx_cache* cache, const lpx_window* window, int32_t ahead, const lpx_selection* selection,
                                   double* out, const lpx_call* call);

/* ---------------------------------------------------------------- compaction */

typedef enum lpx_target {
  LPX_TO_RAGGED = 0,  /* flat rows: kept entry e of the selection becomes row e of each target plane (page 0, slot e, head 0) */
  LPX_TO_PAGES = 1,   /* pages of one (layer, sequence, KV head) each, taken from free lists (page, slot, head 0) */
  LPX_TO_IN_PLACE = 2 /* rows move to the front of their own segment */
} lpx_target;

/* Free page ids of one layer, consumed from the front in order of segments. CUDA: trusted to be free and each there once. */
typedef struct lpx_free_list {
  const int32_t* pages;
  int64_t count;
} lpx_free_list;

typedef struct lpx_compaction {
  size_t size;
  lpx_target target;
  /*
   * RAGGED: one set of planes for all layers. PAGES: [layers] sets, which may be the same pool. IN_PLACE: unused (NULL).
   * key and value are required; position is optional (written when present, and required in the source of an IN_PLACE
   * compaction); value_norm is moved where both sides have it.
   */
  const lpx_cache_layer* layer;
  int32_t layers;   /* sets in `layer`: 1 for RAGGED, the cache's layers for PAGES */
  int32_t* lengths; /* out [segments]: kept rows of each segment; NULL: not wanted */
  /* PAGES */
  const lpx_free_list* free_lists; /* [free_list_count] */
  int32_t free_list_count;         /* 1: one list for all layers (one pool); layers: one list each */
  int32_t* page_table;             /* out [segments, table_width], unused entries -1 */
  int32_t table_width;
  int64_t* pages_used; /* out [free_list_count] */
  /* IN_PLACE, of paged caches: ids of pages that hold no row any more */
  int32_t* freed_pages; /* out, layer by layer; NULL: not wanted */
  int64_t freed_capacity;
  int64_t* freed_counts; /* out [layers] */
} lpx_compaction;

LAPROX_API lpx_status lpx_compact_workspace(const lpx_device* device, const lpx_cache* cache, const lpx_selection* selection,
                                            const lpx_compaction* target, int64_t* bytes);
/* Moves the kept rows, in order. Everything is checked before the first row moves. */
LAPROX_API lpx_status lpx_compact(lpx_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                                  const lpx_call* call);

/* ---------------------------------------------------------------- eviction */

/*
 * lpx_select_cache, and lpx_compact of what it selects, in one call: the same results. On a CUDA device it is the faster way, since
 * the cache is described to the device, and checked there, once. `selection` is written.
 */
LAPROX_API lpx_status lpx_evict_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                          const lpx_select_rule* select_rule, const lpx_compaction* target, int64_t* bytes);
LAPROX_API lpx_status lpx_evict(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                const lpx_select_rule* select_rule, const lpx_selection* selection, lpx_report* report, const lpx_compaction* target,
                                const lpx_call* call);

#ifdef __cplusplus
}
#endif
#endif
