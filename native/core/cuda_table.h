/*
 * What liblaprox_cuda exports: one function that gives one table. The core loads it at run time, so that laprox works where
 * there is no driver. Functions mean what the lpx_ functions of the same names mean; handles are the library's own.
 */
#ifndef LAPROX_CUDA_TABLE_H
#define LAPROX_CUDA_TABLE_H

#include "laprox/laprox.h"

/* Raised with every change of this file. */
#define LAPROX_CUDA_TABLE_VERSION 3
#define LAPROX_CUDA_TABLE_SYMBOL "laprox_cuda_table"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lpx_cuda_device lpx_cuda_device;
typedef struct lpx_cuda_model lpx_cuda_model;

typedef struct lpx_cuda_table {
  uint32_t version;    /* LAPROX_CUDA_TABLE_VERSION */
  const char* release; /* of laprox, "0.1.0" */
  const char* (*last_error)(void);

  lpx_status (*get_backend_info)(lpx_backend_info* info);
  lpx_status (*device_open)(const lpx_device_options* options, lpx_cuda_device** device);
  void (*device_close)(lpx_cuda_device* device);
  lpx_status (*get_device_info)(const lpx_cuda_device* device, lpx_device_info* info);
  lpx_status (*check_device)(lpx_cuda_device* device);

  lpx_status (*allocate)(lpx_cuda_device* device, lpx_memory kind, int64_t bytes, void* stream, void** memory);
  void (*free)(lpx_cuda_device* device, lpx_memory kind, void* memory, void* stream);
  lpx_status (*copy)(lpx_cuda_device* device, void* to, const void* from, int64_t bytes, void* stream);
  lpx_status (*fill)(lpx_cuda_device* device, void* memory, int value, int64_t bytes, void* stream);
  lpx_status (*notify)(lpx_cuda_device* device, void* stream, lpx_done done, void* user);
  lpx_status (*wait_event)(lpx_cuda_device* device, void* stream, void* event);
  lpx_status (*record_event)(lpx_cuda_device* device, void* stream, void* event);
  lpx_status (*synchronize)(lpx_cuda_device* device, void* stream);

  lpx_status (*model_create)(lpx_cuda_device* device, const lpx_model_desc* desc, const lpx_call* call, lpx_cuda_model** model);
  void (*model_destroy)(lpx_cuda_model* model);

  lpx_status (*value_norms)(lpx_cuda_device* device, const lpx_cache* cache, const lpx_call* call);
  lpx_status (*score_workspace)(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule,
                                int64_t* bytes);
  lpx_status (*score)(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, const lpx_scores* out,
                      const lpx_call* call);
  lpx_status (*select_workspace)(const lpx_cuda_device* device, const lpx_scores* scores, const lpx_select_rule* rule, int64_t* bytes);
  lpx_status (*select)(lpx_cuda_device* device, const lpx_scores* scores, const lpx_select_rule* rule, const lpx_selection* out, lpx_report* report,
                       const lpx_call* call);
  lpx_status (*select_cache_workspace)(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window,
                                       const lpx_score_rule* score_rule, const lpx_select_rule* select_rule, int64_t* bytes);
  lpx_status (*select_cache)(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                             const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call* call);
  lpx_status (*compact_workspace)(const lpx_cuda_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                                  int64_t* bytes);
  lpx_status (*compact)(lpx_cuda_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                        const lpx_call* call);
  lpx_status (*evict_workspace)(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                const lpx_select_rule* select_rule, const lpx_compaction* target, int64_t* bytes);
  lpx_status (*evict)(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                      const lpx_select_rule* select_rule, const lpx_selection* selection, lpx_report* report, const lpx_compaction* target,
                      const lpx_call* call);
} lpx_cuda_table;

/* NULL where the caller wants another version. */
typedef const lpx_cuda_table* (*lpx_cuda_table_function)(uint32_t version);

#ifdef __cplusplus
}
#endif
#endif
