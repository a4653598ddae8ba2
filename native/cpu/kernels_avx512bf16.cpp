// Logits by the instruction of AVX-512 that multiplies pairs of numbers in bfloat16 and adds in float, on AMD's processors at the rate of
// multiply-adds of floats: twice as many products. For keys and queries of that type; all others, and all other kernels, are those of AVX-512.
//
// A row of bfloat16 is moved as one of half as many floats, and keys are read where they are. The instruction takes subnormal numbers for 0, which
// matters only where those that they are multiplied by are huge: queries with subnormal or huge numbers are multiplied in float.
#if defined(__x86_64__)
#define LPX_LANES 16
#define LPX_NAMESPACE avx512bf16
#include "cpu/products.inl"

namespace laprox::cpu {
namespace avx512bf16 {

constexpr int kInWord = 2;                     // numbers
constexpr uint32_t kLeastNormal = 0x00800000;  // bits of 2^-126
constexpr int kWordsAtOnce = 8;                // that rows are moved by

struct Pairs {
  static vf add(vf sum, float one, vf others) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_set1_ps(one)), reinterpret_cast<__m512bh>(others));
  }
};

// Whether rows can be moved as words.
bool has_words(lpx_dtype dtype, int depth) { return dtype == LPX_BF16 && depth % (kInWord * kWordsAtOnce) == 0; }

// Whether a tile is multiplied by pairs: `logits` and `scan` have to agree.
template <typename Tile>
bool in_pairs(const Tile& tile) {
  return has_words(tile.key_type, tile.depth) && has_words(tile.query_type, tile.depth) && !tile.in_float;
}

int64_t pack_size(int count, int depth) { return avx512_kernels().pack_size(count, depth) + avx512_kernels().pack_size(count, depth / kInWord); }

// As AVX-512 has them, then, if there are any, words likewise.
void pack(lpx_dtype dtype, const void* const* rows, int count, int depth, std::byte* out) {
  avx512_kernels().pack(dtype, rows, count, depth, out);
  if (!has_words(dtype, depth)) return;
  avx512_kernels().pack(LPX_F32, rows, count, depth / kInWord, out + avx512_kernels().pack_size(count, depth));
}

void logits(const LogitTile& tile) {
  if (!in_pairs(tile)) return avx512_kernels().logits(tile);
  const int words = tile.depth / kInWord;
  auto* keys = reinterpret_cast<float*>(tile.room);
  avx512_kernels().load(LPX_F32, tile.keys, tile.count, words, keys);
  const std::byte* queries = tile.queries + avx512_kernels().pack_size(tile.rows, tile.depth);
  multiply_panels<Pairs>(reinterpret_cast<const float*>(queries), tile.rows, words, keys, tile.count, tile.out);
}

// out[pair of vectors][depth / 2][2 * lanes] words. Not those of huge or subnormal numbers, infinity and NaN.
bool split(lpx_dtype dtype, const float* queries, int vectors, int depth, uint16_t* out) {
  if (!has_words(dtype, depth)) return true;
  auto* words = reinterpret_cast<uint32_t*>(out);
  vi strange = {};
  for (int64_t row = 0; row < int64_t{(vectors + 1) / 2} * depth; row += kInWord) {
    for (int j = 0; j < 2; ++j, words += kLanes) {
      vf numbers[kInWord];
      for (int i = 0; i < kInWord; ++i) {
        numbers[i] = load_vector(queries + (row + i) * kStripe + static_cast<ptrdiff_t>(j) * kLanes);
        const vu magnitude = reinterpret_cast<vu>(numbers[i]) & 0x7fffffffu;
        strange |= (magnitude - 1u < kLeastNormal - 1u) | (magnitude >= kHugeBits);
      }
      store_bits(words, pack_halves(numbers[0], numbers[1]));
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (strange[lane] != 0) return false;
  return true;
}

void scan(const ScanRun& run, double* sums, uint32_t* kept) {
  if (!in_pairs(run)) return avx512_kernels().scan(run, sums, kept);
  for_each_tile(run, kept, [sums](const ScanRun& tile, uint32_t* kept_of_tile) {
    if (tile.values != nullptr) avx512_kernels().norms(tile.key_type, tile.values, tile.count, tile.depth, tile.norms);
    scan_operands<Pairs>(tile, {tile.keys, reinterpret_cast<const float*>(tile.split_queries), tile.depth / kInWord}, sums, kept_of_tile);
  });
}

}  // namespace avx512bf16

const Kernels& avx512bf16_kernels() noexcept {
  static const Kernels kernels = []() noexcept {
    Kernels all = avx512_kernels();
    all.name = "avx512bf16";
    all.pack_size = avx512bf16::pack_size;
    all.pack = avx512bf16::pack;
    all.logits = avx512bf16::logits;
    all.split_parts = 1;
    all.split = avx512bf16::split;
    all.scan = avx512bf16::scan;
    return all;
  }();
  return kernels;
}

}  // namespace laprox::cpu
#endif
