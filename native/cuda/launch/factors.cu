#include <algorithm>
#include <limits>

#include "cuda/kernels/factors.cuh"
#include "cuda/launch/factors.hpp"

namespace laprox::cuda {
namespace {

constexpr int64_t kBatchBytes = int64_t{192} << 20;  // of double-precision matrices at a time
constexpr int kSquarings = 6;

// Device memory for the time of a constructor.
class Temporary {
 public:
  explicit Temporary(int64_t bytes) { check(cudaMalloc(&data_, static_cast<size_t>(bytes)), "model creation"); }
  ~Temporary() { cudaFree(data_); }
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

template <typename Source>
void gram(const Launch& launch, const Source& source, int batch, int size, int depth, double alpha, double beta, double* out, int64_t batch_stride,
          int64_t row_stride, bool mirrored) {
  const auto tiles = static_cast<unsigned>(ceil_div(size, kGramTile));
  launch.run("gram", gram_kernel<Source>, dim3(tiles * (tiles + 1) / 2, static_cast<unsigned>(batch)), kGramThreads, 0, source, size, depth, alpha,
             beta, out, batch_stride, row_stride, mirrored);
}

template <typename T>
void weight_gram(const Launch& launch, const ModelShape& model, const Projection& projection, const char* const* data, int batch, double* out) {
  const int size = model.group * model.head_dim;
  gram(launch, WeightSource<T>{data, projection.row_stride, projection.column_stride, projection.row_stride <= projection.column_stride}, batch, size,
       model.model_dim, 1, 0, out, int64_t{size} * size, size, true);
}

void cholesky(const Launch& launch, double* matrices, int batch, int size, const double* diagonals) {
  constexpr int kShared = 2 * kGramTile * (kGramTile + 1) * static_cast<int>(sizeof(double));
  for (int first = 0; first < size; first += kGramTile) {
    launch.run("cholesky", cholesky_diagonal_kernel, static_cast<unsigned>(batch), 256, 0, matrices, size, first, diagonals);
    const int rest = size - first - kGramTile;
    if (rest <= 0) break;
    launch.run("cholesky", cholesky_rows_kernel, dim3(static_cast<unsigned>(ceil_div(rest, kGramTile)), static_cast<unsigned>(batch)), kGramTile,
               kShared, matrices, size, first);
    double* corner = matrices + int64_t{first + kGramTile} * (size + 1);
    gram(launch, MatrixSource{corner - kGramTile, int64_t{size} * size, size}, batch, rest, kGramTile, -1, 1, corner, int64_t{size} * size, size,
         false);
  }
}

// singular[i] = max(singular[i], bound of the square root of the largest eigenvalue of power[i]). Overwrites both buffers.
void singular_bounds(const Launch& launch, double* power, double* other, double* log_scales, int count, int head_dim, float* singular) {
  const int elements = head_dim * head_dim;
  for (int step = 0;; ++step) {
    launch.run("singular values", norm_kernel, static_cast<unsigned>(count), 256, 0, power, elements, log_scales, step, kSquarings, singular);
    if (step == kSquarings) return;
    gram(launch, MatrixSource{power, elements, head_dim}, count, head_dim, head_dim, 1, 0, other, elements, head_dim, true);
    std::swap(power, other);
  }
}

template <typename T>
void rounded_bounds(const Launch& launch, const ModelShape& model, const double* matrices, const float* scales, int batch, double* power,
                    double* other, double* log_scales, float* singular) {
  const int d = model.head_dim;
  gram(launch, RoundedSource<T>{matrices, scales, model.group, d}, batch * model.group, d, 0, 1, 0, power, int64_t{d} * d, d, true);
  singular_bounds(launch, power, other, log_scales, batch * model.group, d, singular);
}

template <typename T>
void write_image(const Launch& launch, const ModelShape& model, const double* matrices, const float* scales, int batch, char* image, int64_t bytes) {
  launch.run("factor image", image_kernel<T>, dim3(static_cast<unsigned>(model.group), static_cast<unsigned>(batch)), 512, 0, matrices, model.group,
             model.head_dim, scales, image, bytes);
}

}  // namespace

template <typename T>
T* DeviceFactors::allocate(int64_t count) {
  void* data = nullptr;
  const int64_t bytes = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
  check(cudaMalloc(&data, static_cast<size_t>(bytes)), "model creation");
  owned_.push_back(data);
  bytes_ += bytes;
  return static_cast<T*>(data);
}

void DeviceFactors::release() noexcept {
  for (void* data : owned_) cudaFree(data);
  owned_.clear();
}

DeviceFactors::~DeviceFactors() { release(); }

DeviceFactors::DeviceFactors(const Launch& launch, const ModelShape& model, lpx_dtype precision) : precision_(precision) {
  try {
    build(launch, model);
  } catch (...) {
    cudaStreamSynchronize(launch.stream);
    release();
    throw;
  }
}

void DeviceFactors::build(const Launch& launch, const ModelShape& model) {
  int32_t used = 0;
  for (const Layer& layer : model.layers) slots_.push_back(layer.projection ? used++ : -1);
  complete_ = used == static_cast<int32_t>(model.layers.size());
  const int group = model.group;
  const int d = model.head_dim;
  const int size = group * d;
  const int64_t heads = int64_t{used} * model.kv_heads;
  const bool image = precision_ != LPX_F32 && has_image(group, d) && used > 0;

  auto* slots = allocate<int32_t>(static_cast<int64_t>(slots_.size()));
  check(cudaMemcpyAsync(slots, slots_.data(), slots_.size() * sizeof(int32_t), cudaMemcpyHostToDevice, launch.stream), "model creation");
  singular_ = allocate<float>(static_cast<int64_t>(slots_.size()) * model.query_heads);
  check(cudaMemsetAsync(singular_, 0, slots_.size() * static_cast<size_t>(model.query_heads) * sizeof(float), launch.stream), "model creation");
  view_.slots = slots;
  view_.plain_floats = plain_floats(group, d);
  view_.image_bytes = image_bytes(group, d);
  auto* plain = allocate<float>(heads * view_.plain_floats);
  auto* scales = allocate<float>(heads);
  auto* images = image ? allocate<char>(heads * view_.image_bytes) : nullptr;
  view_.plain = plain;
  view_.scales = scales;
  view_.image = images;
  if (used == 0) {
    check(cudaStreamSynchronize(launch.stream), "model creation");
    return;
  }

  const int64_t matrix = int64_t{size} * size;
  const int batch = static_cast<int>(std::clamp<int64_t>(kBatchBytes / (matrix * 8), 1, model.kv_heads));
  const Temporary matrices(batch * matrix * 8);
  const Temporary power(int64_t{batch} * group * d * d * 8);
  const Temporary other(int64_t{batch} * group * d * d * 8);
  const Temporary log_scales(int64_t{batch} * group * 8);
  const Temporary diagonals(int64_t{batch} * size * 8);
  const Temporary bad(8);
  // Where each KV head's slices begin, for all layers: [layers][kv_heads].
  std::vector<const char*> starts;
  for (const Layer& layer : model.layers)
    for (int g = 0; g < model.kv_heads; ++g)
      starts.push_back(layer.projection ? reinterpret_cast<const char*>(layer.projection.at(int64_t{g} * size, 0)) : nullptr);
  const Temporary device_starts(static_cast<int64_t>(starts.size() * sizeof(char*)));
  check(cudaMemcpyAsync(device_starts.as<void>(), starts.data(), starts.size() * sizeof(char*), cudaMemcpyHostToDevice, launch.stream),
        "model creation");
  check(cudaMemsetAsync(bad.as<void>(), 0xff, 8, launch.stream), "model creation");

  for (size_t l = 0; l < model.layers.size(); ++l) {
    if (slots_[l] < 0) continue;
    const Projection& projection = model.layers[l].projection;
    for (int g = 0; g < model.kv_heads; g += batch) {
      const int count = std::min(batch, model.kv_heads - g);
      const int64_t first = int64_t{slots_[l]} * model.kv_heads + g;
      const char* const* data = device_starts.as<const char*>() + static_cast<int64_t>(l) * model.kv_heads + g;
      auto* grams = matrices.as<double>();
      switch (model.projection_dtype) {
        case LPX_F32: weight_gram<float>(launch, model, projection, data, count, grams); break;
        case LPX_F16: weight_gram<__half>(launch, model, projection, data, count, grams); break;
        case LPX_BF16: weight_gram<__nv_bfloat16>(launch, model, projection, data, count, grams); break;
      }
      const int64_t first_row = (static_cast<int64_t>(l) * model.kv_heads + g) * size;
      launch.run("diagonal", diagonal_kernel, static_cast<unsigned>(count), 256, 0, grams, size, matrix, first_row, diagonals.as<double>(),
                 bad.as<unsigned long long>());
      float* singular = singular_ + static_cast<int64_t>(l) * model.query_heads + int64_t{g} * group;
      launch.run("head blocks", head_blocks_kernel, static_cast<unsigned>(count * group), 256, 0, grams, group, d, power.as<double>());
      singular_bounds(launch, power.as<double>(), other.as<double>(), log_scales.as<double>(), count * group, d, singular);
      cholesky(launch, grams, count, size, diagonals.as<double>());
      launch.run("factor scale", scale_kernel, static_cast<unsigned>(count), 256, 0, grams, size, scales + first);
      launch.run("plain factor", plain_kernel, dim3(64, static_cast<unsigned>(count)), 256, 0, grams, group, d, plain + first * view_.plain_floats,
                 view_.plain_floats);
      if (images == nullptr) continue;
      char* to = images + first * view_.image_bytes;
      if (precision_ == LPX_BF16) {
        write_image<__nv_bfloat16>(launch, model, grams, scales + first, count, to, view_.image_bytes);
        rounded_bounds<__nv_bfloat16>(launch, model, grams, scales + first, count, power.as<double>(), other.as<double>(), log_scales.as<double>(),
                                      singular);
      } else {
        write_image<__half>(launch, model, grams, scales + first, count, to, view_.image_bytes);
        rounded_bounds<__half>(launch, model, grams, scales + first, count, power.as<double>(), other.as<double>(), log_scales.as<double>(),
                               singular);
      }
    }
  }
  unsigned long long first_bad = 0;
  check(cudaMemcpyAsync(&first_bad, bad.as<void>(), 8, cudaMemcpyDeviceToHost, launch.stream), "model creation");
  check(cudaStreamSynchronize(launch.stream), "model creation");
  if (first_bad == std::numeric_limits<unsigned long long>::max()) return;
  const auto row = static_cast<int64_t>(first_bad);
  const int64_t rows = int64_t{model.query_heads} * d;
  fail(LPX_NON_FINITE, "the output projection of layer %d, query head %d, feature %d has a weight that is not finite", static_cast<int>(row / rows),
       static_cast<int>(row % rows / d), static_cast<int>(row % d));
}

}  // namespace laprox::cuda
