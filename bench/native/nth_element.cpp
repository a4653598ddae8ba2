// Selection as one writes it in C++: std::nth_element for the threshold, then a scan for the tokens; one thread.
// nth_element SCORES SEGMENT KEPT REPEATS TOKENS: SCORES is a file of floats in segments of SEGMENT, KEPT how many to keep. Prints the
// seconds of each repeat and writes the kept tokens of segment after segment, int32, to the file TOKENS. Ties keep the smaller index.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  std::ifstream file(argv[1], std::ios::binary | std::ios::ate);
  std::vector<float> scores(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(scores.data()), static_cast<std::streamsize>(scores.size() * sizeof(float)));
  const size_t segment = std::strtoull(argv[2], nullptr, 10);
  const size_t kept = std::strtoull(argv[3], nullptr, 10);
  std::vector<float> ranked(scores.size());
  std::vector<int32_t> tokens(kept);
  for (int repeat = std::atoi(argv[4]); repeat > 0; --repeat) {
    const auto begin = std::chrono::steady_clock::now();
    std::copy(scores.begin(), scores.end(), ranked.begin());
    const auto last = ranked.begin() + static_cast<std::ptrdiff_t>(kept) - 1;
    std::nth_element(ranked.begin(), last, ranked.end(), std::greater<>());
    const float threshold = *last;
    auto ties = static_cast<size_t>(std::count(ranked.begin(), last + 1, threshold));
    int32_t* out = tokens.data();
    for (size_t first = 0; first < scores.size(); first += segment) {
      for (size_t i = 0; i < segment; ++i) {
        const float score = scores[first + i];
        if (score > threshold || (score == threshold && ties > 0 && ties-- > 0)) *out++ = static_cast<int32_t>(i);
      }
    }
    std::printf("%.9f\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::ofstream(argv[5], std::ios::binary).write(reinterpret_cast<const char*>(tokens.data()), static_cast<std::streamsize>(kept * sizeof(int32_t)));
  return 0;
}
