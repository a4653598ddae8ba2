// The arithmetic of a tile: kTile tokens of one segment at a time, tokens along the vector lanes.
//
// Every quantity of a tile is an array [rows][kTile]: one row a query (logits, attention), a factor column (projected
// values) or a pair of heads (products), one lane a token. A lane never looks at another lane, and each lane's sums run in
// one fixed order: the score of a token has the same bits in whatever tile, batch or thread it is computed.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/geometry.hpp"
#include "laprox/laprox.h"

namespace laprox::cpu {

inline constexpr int kTile = 32;
// Rows of the left matrix that `multiply` takes at a time; packed matrices hold panels [depth][kPanel].
inline constexpr int kPanel = 6;
// Tokens of `scan` and `sample`.
inline constexpr int kScanBlock = 6;              // multiplied at once
inline constexpr int kScanTile = 8 * kScanBlock;  // that the nearer caches hold; `sample` takes no more in a call
inline constexpr int kScanRun = 10 * kScanTile;   // that `scan` takes in a call, at most
inline constexpr int kScanAhead = 2 * kScanTile;  // behind a run that `scan` asks for, at most
// Tokens that `pool_keys` takes at a time.
inline constexpr int kPoolChunk = 2048;
// Quadratic forms that `forms` takes at a time.
inline constexpr int kFormPairs = 5;
// Share of the own pairs below which a joint score's sum has cancelled too far.
inline constexpr float kCancelled = 0.02f;

// Numbers in bfloat16 that a float is split into where tiles of such are multiplied, and the size of a tile.
inline constexpr int kSplitParts = 3;
inline constexpr int kSplitDepth = 32;
inline constexpr int kSplitRows = 16;  // of a tile

// Queries with such numbers, infinity or NaN are multiplied in float, not in bfloat16, and on AMX keys, too.
inline constexpr float kHuge = 0x1p64f;
inline constexpr auto kHugeBits = std::bit_cast<uint32_t>(kHuge);

inline constexpr int panels_for(int rows) { return (rows + kPanel - 1) / kPanel; }
inline constexpr int pair_count(int heads) { return heads * (heads + 1) / 2; }
// In whole tiles.
inline constexpr int padded_depth(int depth) { return (depth + kSplitDepth - 1) / kSplitDepth * kSplitDepth; }
inline constexpr int padded_rows(int rows) { return (rows + kSplitRows - 1) / kSplitRows * kSplitRows; }
// Numbers of a row of `depth` once it is split.
inline constexpr int split_size(int depth) { return kSplitParts * padded_depth(depth); }
// Parts that numbers of a type fill; those behind are 0.
inline constexpr int split_parts(lpx_dtype dtype) { return dtype == LPX_F32 ? 3 : dtype == LPX_F16 ? 2 : 1; }
// Numbers of the split keys of a tile, and of ScanRun::room and LogitTile::room.
inline constexpr int split_keys_size(int depth) { return kScanTile * split_size(depth); }
inline constexpr int room_size(int depth) { return 2 * split_keys_size(depth); }
// Pairs (h, h') with h <= h' of one group, in a triangle.
inline constexpr int pair_index(int h, int other) { return other * (other + 1) / 2 + h; }

// Which tokens of a tile a window row sees: positions above `first` and up to `last`.
struct Visibility {
  const int32_t* positions;  // of the tokens, and INT32_MAX up to a whole tile
  int32_t last;              // position of window row 0; row q sees up to last + q
  int32_t window;            // sliding window, 0 for none
};

// Tokens as `logits` takes them: each query row's products with all of them.
struct LogitTile {
  const void* const* keys;  // [count] rows of `depth` numbers
  lpx_dtype key_type;
  int count;
  int depth;
  const std::byte* queries;  // as `pack` leaves `rows` of them
  lpx_dtype query_type;
  int rows;
  bool in_float;   // the queries have numbers that are not split
  uint16_t* room;  // for keys that are converted, aligned to 64
  float* out;      // [rows][kTile], in whole panels and tiles
};

struct AttentionTile {
  float* logits;  // [heads * rows][kTile]; overwritten
  int count;      // tokens; whole vectors are computed
  int heads;
  int rows;
  float scale;
  float soft_cap;
  // [heads * rows] in base 2: attention = 2^(logit * log2(e) - reference - residual), where the residual is what a log-sum-exp
  // in float leaves out. No residual: null.
  const float* reference;
  const float* residual;
  const Visibility* masked;  // null where every row sees every token
};

// Tokens as `scan` takes them: here query rows lie along the vector lanes, so that keys are read where they are.
struct ScanRun {
  const void* const* keys;    // [count + ahead] rows of `depth` numbers
  const void* const* values;  // [count + ahead], or null
  float* norms;               // [count] where `scan` leaves ||values[t]||_2, if there are values
  int ahead;                  // rows that are wanted next: asked for between products
  lpx_dtype key_type;
  int count;
  int depth;
  const float* queries;  // packed as `load` leaves tokens: a pair of vectors after the other, [depth][2 * lanes]; the last may be one
  int vectors;           // of query rows
  const int32_t* rows;   // [vectors * lanes] the window row of each packed row
  float scale;
  float soft_cap;
  const float* reference;         // [vectors * lanes] in base 2; +inf where there is no row
  const Visibility* masked;       // null where every row sees every token
  const uint16_t* split_queries;  // what Kernels::split made of them, if it is there
  lpx_dtype query_type;
  bool in_float;   // the queries have numbers that are not split
  uint16_t* room;  // for keys that are converted, aligned to 64
};

struct Kernels {
  const char* name;
  int lanes;  // of a vector of floats
  // rows[i] of `depth` elements, i < count, to the layout that `multiply` reads; absent tokens become 0.
  void (*load)(lpx_dtype dtype, const void* const* rows, int count, int depth, float* tile);
  void (*convert)(lpx_dtype dtype, const void* from, int64_t count, float* to);
  // out[r][t] = sum over k of panels[r][k] * tile[k][t], k ascending, of whole vectors that hold tokens t < count. `out` has room
  // for whole panels.
  void (*multiply)(const float* panels, int rows, int depth, const float* tile, int count, float* out);
  // Query rows for `logits`: rows[i] of `depth` numbers, i < count; pack_size(count, depth) bytes, aligned to 64.
  int64_t (*pack_size)(int count, int depth);
  void (*pack)(lpx_dtype dtype, const void* const* rows, int count, int depth, std::byte* out);
  // out[r][t] = sum over k of queries[r][k] * keys[t][k], of whole vectors that hold tokens t < count: the bits that `scan` has.
  void (*logits)(const LogitTile& tile);
  // Logits to attention, 0 where a row does not see a token. In place.
  void (*attend)(const AttentionTile& tile);
  // Running log-sum-exp in base 2 of packed rows: sums[r] = sum of 2^(logit - largest[r]). The reference is not read.
  void (*sample)(const ScanRun& tile, float* largest, float* sums);
  // Numbers in bfloat16 that `split` makes of one; 0 where `scan` multiplies floats alone, and there is no `split`.
  int split_parts;
  // Queries of a type, as `load` leaves them, for `scan`: [vectors * lanes] rows of split_parts * padded_depth(depth). Returns whether they could be
  // split.
  bool (*split)(lpx_dtype dtype, const float* queries, int vectors, int depth, uint16_t* out);
  // Adds to sums[r] the row sums of e, the attention by the reference. Keeps them, unless `kept` is null, cut to bfloat16, for `square`:
  // kept[t][pair][lane] has that of the pair's first vector in its lower half.
  void (*scan)(const ScanRun& run, double* sums, uint32_t* kept);
  // out[t][chunk * lanes + lane] = sum over the vectors of a chunk of (e * weights)^2, of what `scan` kept of `count` tokens; a token has whole
  // eights.
  void (*square)(const uint32_t* kept, int count, int chunks, int vectors, const float* weights, float* out);
  // out[pair][t] = sum over i <= j of forms[pair][i][j] * tile[i][t] * tile[j][t], for tokens t < count in whole vectors; `tile` as `load` leaves
  // it. kFormPairs forms at a time, and of these [i][j][pair].
  void (*forms)(const float* forms, int pairs, int depth, const float* tile, int count, float* out);
  // out[pair(first + a, first + b)][t] += sum over r of x[a][r][t] * x[b][r][t], a <= b < heads.
  void (*pair_products)(const float* x, int heads, int rows, int first, float* out);
  // out[t] = sqrt(max(0, sum over pairs of attention * values, cross pairs twice)). Returns a bit for each token whose cross
  // pairs cancel its own pairs so far that the difference has lost digits.
  uint32_t (*joint)(const float* attention, const float* values, int heads, float* out);
  // out[t] = sum over heads of sqrt(attention[h][h] * values[h][h]).
  void (*bound)(const float* attention, const float* values, int heads, float* out);
  // out[h][t] = the statistic over the rows of each head. `existing` rows count for the mean.
  void (*attention_statistic)(const float* attention, int heads, int rows, int existing, lpx_attention_statistic statistic, float* out);
  // out[t] = the aggregate of x[h][t] over heads.
  void (*aggregate)(const float* x, int heads, lpx_aggregation aggregation, float* out);
  // out[t] += sum over r of |x[r][t]|.
  void (*add_magnitudes)(const float* x, int rows, float* out);
  // Attention a to a / max(1 - a, 1e-3). In place.
  void (*removal_weights)(float* attention, int rows);
  // out[t] += sum over q, c of (sum over h of weights[h][q][t] * (outputs[h][q][c] - values[h][c][t]))^2; head h of `outputs`
  // is output_stride floats after the head before, row q is row_stride floats after the row before.
  void (*removal)(const float* weights, const float* outputs, int64_t output_stride, int64_t row_stride, const float* values, int heads, int rows,
                  int columns, float* out);
  // outputs[r][c] += sum over t of attention[r][t] * values[t][c]
  void (*add_outputs)(const float* attention, int rows, const float* values, int depth, float* outputs);
  // out[i] = ||rows[i]||_2, ||rows[i]||_1
  void (*norms)(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out);
  void (*magnitudes)(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out);
  // Upper bounds of a tile's scores: norms[t] * sum over heads of singular[h] * sqrt(sum over parts of squares[h * parts + p][t]), with a
  // margin for rounding. `squares` as `load` leaves `depth` of them.
  void (*upper_bounds)(const float* squares, int depth, const float* singular, int heads, int parts, const float* norms, float* out);
  // out[i] = the key of the largest of values[i .. i + width), i < count <= kPoolChunk: an unsigned integer in the order of floats.
  void (*pool_keys)(const float* values, int64_t count, int width, uint32_t* out);
  // The keys from `least` to `most`, in order, and the indices of such keys. Return how many; `out` has room for `count`.
  int64_t (*pick_keys)(const uint32_t* keys, int64_t count, uint32_t least, uint32_t most, uint32_t* out);
  int64_t (*pick)(const uint32_t* keys, int64_t count, uint32_t least, uint32_t most, int32_t* out);
  // out[i][j] = sum over k of a[k][i] * b[k][j]: a block of 8 x 8 in double.
  void (*gram)(const double* a, const double* b, int depth, double* out);
  // Copies past the caches, where `to` and the bytes are aligned: what is written once and not read soon need not be fetched before it is
  // overwritten, and pushes nothing out. Others see it after end_stream().
  void (*stream)(void* to, const void* from, int64_t bytes);
  void (*end_stream)();
};

const Kernels& baseline_kernels() noexcept;
#if defined(__x86_64__)
const Kernels& avx2_kernels() noexcept;
const Kernels& avx512_kernels() noexcept;
// avx512_kernels(), with logits by other instructions, AVX512-BF16 and AMX. To be called where the processor has that and the system allows it.
const Kernels& avx512bf16_kernels() noexcept;
const Kernels& amx_kernels() noexcept;
#endif

}  // namespace laprox::cpu
