// Seeded caches for the benchmark on a GPU. Every number is a function of its place, so that a GPU writes them in any order and
// a host writes the same.
//
// `peaked` is bench/synthetic.ts, a head at a time: keys carry heavy-tailed features that drift along the text, a query looks for
// a mixture of them (what its whole group looks for, what its head does, what it alone does), the last tokens stand out, and value
// norms differ between heads and within one. `diffuse` is Gaussian throughout. Arrays are bfloat16 and contiguous:
//   keys, values [layers, kv_heads, tokens, d]   queries [layers, query_heads, rows, d]   projections [layers, D, query_heads * d]
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

namespace bench {

enum class Input { kPeaked, kDiffuse };

struct Shape {
  int layers;
  int query_heads;
  int kv_heads;
  int head_dim;
  int model_dim;
  int rows;  // of the window
  int tokens;

  __host__ __device__ int group() const { return query_heads / kv_heads; }
  __host__ __device__ int segments() const { return layers * kv_heads; }
  __host__ __device__ int64_t entries() const { return int64_t{segments()} * tokens; }
  __host__ __device__ int64_t cache_elements() const { return entries() * head_dim; }  // of keys, or of values
  __host__ __device__ int64_t query_elements() const { return int64_t{layers} * query_heads * rows * head_dim; }
  __host__ __device__ int64_t projection_elements() const { return int64_t{layers} * model_dim * query_heads * head_dim; }
};

// ---------------------------------------------------------------- random numbers

enum Stream : uint64_t { kSharpness, kGroup, kHead, kRow, kRecency, kQueryNoise, kFeature, kKeyNoise, kLoudness, kValueNorm, kValueNoise, kWeight };

__host__ __device__ inline uint64_t mix(uint64_t z) {  // splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

struct Random {
  uint64_t key;

  __host__ __device__ Random(uint64_t seed, Stream stream) : key(mix(seed * 0x9e3779b97f4a7c15u + (uint64_t{stream} + 1) * 0xd1b54a32d192ed03u)) {}

  __host__ __device__ uint64_t bits(uint64_t place) const { return mix(key + place * 0x9e3779b97f4a7c15u); }
  // In (0, 1).
  __host__ __device__ float uniform(uint64_t place) const { return (static_cast<float>(bits(place) >> 41) + 0.5f) * 0x1p-23f; }
  __host__ __device__ float normal(uint64_t place) const { return pair(place).x; }
  // Two independent standard normals.
  __host__ __device__ float2 pair(uint64_t place) const {
    const uint64_t both = bits(place);
    const float radius = sqrtf(-2 * logf((static_cast<float>(both >> 41) + 0.5f) * 0x1p-23f));
    const float angle = 6.283185307f * static_cast<float>(both & 0xffffff) * 0x1p-24f;
    return {radius * cosf(angle), radius * sinf(angle)};
  }
  // Nearly normal with mean 0 and variance 1, bounded by 3.5, and fast: sums of four bytes, two of them.
  __host__ __device__ float2 noise(uint64_t place) const {
    const uint64_t both = bits(place);
    return {sum(static_cast<uint32_t>(both)), sum(static_cast<uint32_t>(both >> 32))};
  }

 private:
  __host__ __device__ static float sum(uint32_t b) {
    return (static_cast<float>((b & 255) + ((b >> 8) & 255) + ((b >> 16) & 255) + (b >> 24)) - 510) / 147.8f;
  }
};

// ---------------------------------------------------------------- the generator

struct Generator {
  // The figures of bench/synthetic.ts; what a head looks for alone is longer in larger groups (head_length).
  static constexpr int kFeatures = 16;
  static constexpr float kGroupLength = 1.7f;
  static constexpr float kRowLength = 0.7f;
  static constexpr float kSharpest = 1.4f;
  static constexpr float kBluntest = 0.6f;
  static constexpr float kDrift = 0.85f;
  static constexpr float kNoise = 0.7f;
  static constexpr float kRecencyLogits = 5;
  static constexpr float kRecencyTokens = 16;
  static constexpr float kLoudHeads = 0.4f;
  static constexpr float kLoudTokens = 0.15f;
  static constexpr float kFlattest = 0.3f;
  // Features are computed in pieces of so many tokens, each from so many before it: 0.85^64 is below bfloat16's rounding.
  static constexpr int kPiece = 256;
  static constexpr int kRunUp = 64;

  Shape shape;
  Input input;
  uint64_t seed;

  // Keeps the share of entries above the threshold where needle-lm has it: a sum over more heads is a looser bound.
  __host__ __device__ float head_length() const { return 1.18f + 0.155f * static_cast<float>(shape.group()); }

  // The scale of keys and queries in the dimensions that carry noise alone.
  __host__ __device__ float quiet() const { return sqrtf(kNoise) / sqrtf(sqrtf(1 - static_cast<float>(kFeatures + 1) / shape.head_dim)); }

  // Element `i` of a query row; `head` counts all query heads of all layers.
  __host__ __device__ float query(int head, int row, int i) const {
    const uint64_t place = (static_cast<uint64_t>(head) * shape.rows + row) * shape.head_dim + i;
    const float noise = Random(seed, kQueryNoise).noise(place).x;
    if (input == Input::kDiffuse) return noise;
    if (i > kFeatures) return quiet() * noise;
    const float scale = sqrtf(static_cast<float>(shape.head_dim));
    if (i == kFeatures) return scale * kRecencyLogits * Random(seed, kRecency).uniform(head);
    const int segment = head / shape.group();
    const float sharpness = kBluntest + (kSharpest - kBluntest) * Random(seed, kSharpness).uniform(segment);
    const float mixture = kGroupLength * Random(seed, kGroup).normal(static_cast<uint64_t>(segment) * kFeatures + i) +
                          head_length() * Random(seed, kHead).normal(static_cast<uint64_t>(head) * kFeatures + i) +
                          kRowLength * Random(seed, kRow).normal(place);
    return scale * sharpness * mixture / sqrtf(static_cast<float>(kFeatures));
  }

  // Elements `i` and `i + 1` of a key; features are apart.
  __host__ __device__ float2 key(int segment, int token, int i) const {
    const float2 noise = Random(seed, kKeyNoise).noise(((static_cast<uint64_t>(segment) * shape.tokens + token) * shape.head_dim + i) / 2);
    if (input == Input::kDiffuse) return noise;
    const float recency = expf(static_cast<float>(token + 1 - shape.tokens) / kRecencyTokens);
    return {i == kFeatures ? recency : quiet() * noise.x, quiet() * noise.y};
  }

  // Feature `f` of the tokens of a piece, in order, to `write(token, value)`.
  template <typename Write>
  __host__ __device__ void features(int segment, int f, int piece, Write write) const {
    const Random random(seed, kFeature);
    const float news = sqrtf(1 - kDrift * kDrift);
    const int first = piece * kPiece;
    const int end = first + kPiece < shape.tokens ? first + kPiece : shape.tokens;
    float x = 0;
    for (int token = first - kRunUp; token < end; token++) {
      // The product of two normals: variance 1, heavy tails.
      const float2 normals = random.pair((static_cast<uint64_t>(segment) * (shape.tokens + kRunUp) + (token + kRunUp)) * kFeatures + f);
      x = kDrift * x + news * normals.x * normals.y;
      if (token >= first) write(token, x);
    }
  }

  // Elements `i` and `i + 1` of a value.
  __host__ __device__ float2 value(int segment, int token, int i) const {
    const uint64_t row = static_cast<uint64_t>(segment) * shape.tokens + token;
    const float2 noise = Random(seed, kValueNoise).noise((row * shape.head_dim + i) / 2);
    if (input == Input::kDiffuse) return noise;
    const float norm = expf(kLoudHeads * Random(seed, kLoudness).normal(segment)) * (1 + kLoudTokens * Random(seed, kValueNorm).noise(row).x);
    return {norm * noise.x, norm * noise.y};
  }

  // Elements `j` and `j + 1` of a row of a projection; singular values of a head's slice fall from 1.
  __host__ __device__ float2 weight(int layer, int column, int j) const {
    const int width = shape.query_heads * shape.head_dim;
    const float2 noise = Random(seed, kWeight).noise(((static_cast<uint64_t>(layer) * shape.model_dim + column) * width + j) / 2);
    const float spread = (1 - kFlattest) / static_cast<float>(shape.head_dim - 1);
    const float scale = 1 / sqrtf(static_cast<float>(shape.model_dim));
    const int i = j % shape.head_dim;
    return {noise.x * scale * (kFlattest + spread * i), noise.y * scale * (kFlattest + spread * (i + 1))};
  }
};

}  // namespace bench
