// Times work on a stream with events: the second level cache holds none of its inputs, and the host is ahead of the device.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cxxabi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace bench {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Memory of the device.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)), "cudaMalloc");
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { cudaFree(data_); }

  T* data() const { return data_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  void write(const T* from, int64_t count) {
    check(cudaMemcpy(data_, from, static_cast<size_t>(count) * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  std::vector<T> read() const {
    std::vector<T> to(static_cast<size_t>(count_));
    check(cudaMemcpy(to.data(), data_, to.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

// Microseconds.
struct Timing {
  double median = 0;
  double p10 = 0;
  double p90 = 0;
  double host = 0;  // median of what the calls took the thread that made them
  int runs = 0;
};

inline double quantile(std::vector<double> of, double q) {
  std::sort(of.begin(), of.end());
  const double at = q * static_cast<double>(of.size() - 1);
  const auto below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, of.size() - 1);
  return of[below] + (at - static_cast<double>(below)) * (of[above] - of[below]);
}

class Timer {
 public:
  Timer(cudaStream_t stream, int runs) : stream_(stream), runs_(runs), flush_(kFlushBytes) {
    for (cudaEvent_t& event : events_) check(cudaEventCreate(&event), "cudaEventCreate");
  }
  ~Timer() {
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  int runs() const { return runs_; }

  // After a rest. Fewer runs of what takes longer than 20 ms, and fewer still beyond a tenth of a second.
  template <typename F>
  Timing operator()(F work) {
    std::vector<double> device;
    std::vector<double> host;
    rest();
    once(work, device, host);
    once(work, device, host);
    const double slow = device.back();
    const int runs = std::max(1, slow < 20e3 ? runs_ : slow < 100e3 ? runs_ / 3 : slow < 1e6 ? 3 : 1);
    device.clear();
    host.clear();
    for (int i = 0; i < runs; i++) once(work, device, host);
    return {quantile(device, 0.5), quantile(device, 0.1), quantile(device, 0.9), quantile(host, 0.5), runs};
  }

  // Lets the card cool down from what it did before, so that a figure does not depend on which others were taken first: at the power cap, and
  // some hundreds of milliseconds beyond it, clocks are lower.
  void rest() {
    check(cudaStreamSynchronize(stream_), "what ran before");
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
  }

  // Overwrites the second level cache. Writes twice what it takes, so that the host is well ahead when that is done.
  void flush() { check(cudaMemsetAsync(flush_.data(), 0x5a, kFlushBytes, stream_), "flush"); }

  cudaStream_t stream() const { return stream_; }

 private:
  static constexpr int64_t kFlushBytes = int64_t{512} << 20;

  template <typename F>
  void once(F& work, std::vector<double>& device, std::vector<double>& host) {
    flush();
    check(cudaEventRecord(events_[0], stream_), "cudaEventRecord");
    const auto before = std::chrono::steady_clock::now();
    work();
    host.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - before).count());
    check(cudaEventRecord(events_[1], stream_), "cudaEventRecord");
    check(cudaEventSynchronize(events_[1]), "a run");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, events_[0], events_[1]), "cudaEventElapsedTime");
    device.push_back(milliseconds * 1e3);
  }

  cudaStream_t stream_;
  int runs_;
  Buffer<char> flush_;
  cudaEvent_t events_[2] = {};
};

// A call captured in a graph: what kernels it launches, and how long each takes where it stands.
class Captured {
 public:
  template <typename F>
  Captured(cudaStream_t stream, F call) : stream_(stream) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    try {
      call();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph_);
      if (graph_ != nullptr) cudaGraphDestroy(graph_);
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph_), "cudaStreamEndCapture");
    size_t count = 0;
    check(cudaGraphGetNodes(graph_, nullptr, &count), "cudaGraphGetNodes");
    nodes_.resize(count);
    check(cudaGraphGetNodes(graph_, nodes_.data(), &count), "cudaGraphGetNodes");
    sort();
    for (cudaGraphNode_t node : nodes_) names_.push_back(name(node));
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  ~Captured() {
    for (cudaGraphExec_t run : runs_) cudaGraphExecDestroy(run);
    for (cudaGraph_t graph : graphs_) cudaGraphDestroy(graph);
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
    cudaGraphDestroy(graph_);
  }

  // Of the nodes, in order: a kernel's function without its arguments.
  const std::vector<std::string>& names() const { return names_; }

  // All of it, to be launched.
  cudaGraphExec_t whole() { return instantiate(graph_); }

  // Microseconds of each node in its place, of each run after a rest; nodes one after the other, without the overlap that they have elsewhere.
  std::vector<std::vector<double>> profile(Timer& timer, int runs) {
    cudaGraph_t copy = nullptr;
    check(cudaGraphClone(&copy, graph_), "cudaGraphClone");
    graphs_.push_back(copy);
    std::vector<cudaGraphNode_t> nodes(nodes_.size());
    for (size_t i = 0; i < nodes.size(); i++) check(cudaGraphNodeFindInClone(&nodes[i], nodes_[i], copy), "cudaGraphNodeFindInClone");
    const size_t first = events_.size();
    for (size_t i = 0; i <= nodes.size(); i++) {
      events_.emplace_back();
      check(cudaEventCreate(&events_.back()), "cudaEventCreate");
      if (i < nodes.size()) {  // events come between: nothing overlaps
        const auto [needs, edges] = dependencies(nodes[i]);
        for (size_t k = 0; k < needs.size(); k++)
          check(cudaGraphRemoveDependencies(copy, &needs[k], &nodes[i], &edges[k], 1), "cudaGraphRemoveDependencies");
      }
      cudaGraphNode_t record = nullptr;
      check(cudaGraphAddEventRecordNode(&record, copy, i == 0 ? nullptr : &nodes[i - 1], i == 0 ? 0 : 1, events_.back()),
            "cudaGraphAddEventRecordNode");
      if (i < nodes.size()) check(cudaGraphAddDependencies(copy, &record, &nodes[i], nullptr, 1), "cudaGraphAddDependencies");
    }
    cudaGraphExec_t run = instantiate(copy);
    std::vector<std::vector<double>> times(nodes.size());
    timer.rest();
    for (int i = 0; i < runs; i++) {
      timer.flush();
      check(cudaGraphLaunch(run, stream_), "cudaGraphLaunch");
      check(cudaStreamSynchronize(stream_), "a profiled run");
      for (size_t j = 0; j < nodes.size(); j++) {
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, events_[first + j], events_[first + j + 1]), "cudaEventElapsedTime");
        times[j].push_back(milliseconds * 1e3);
      }
    }
    return times;
  }

 private:
  cudaGraphExec_t instantiate(cudaGraph_t graph) {
    runs_.emplace_back();
    check(cudaGraphInstantiate(&runs_.back(), graph, 0), "cudaGraphInstantiate");
    return runs_.back();
  }

  // What a node waits for, and how: kernels of laprox begin before the ones they wait for have ended.
  static std::pair<std::vector<cudaGraphNode_t>, std::vector<cudaGraphEdgeData>> dependencies(cudaGraphNode_t node) {
    size_t count = 0;
    check(cudaGraphNodeGetDependencies(node, nullptr, nullptr, &count), "cudaGraphNodeGetDependencies");
    std::vector<cudaGraphNode_t> nodes(count);
    std::vector<cudaGraphEdgeData> edges(count);
    check(cudaGraphNodeGetDependencies(node, nodes.data(), edges.data(), &count), "cudaGraphNodeGetDependencies");
    return {nodes, edges};
  }

  // Puts the nodes in the order they run in.
  void sort() {
    std::vector<cudaGraphNode_t> sorted;
    while (sorted.size() < nodes_.size()) {
      const size_t before = sorted.size();
      for (cudaGraphNode_t node : nodes_) {
        if (std::find(sorted.begin(), sorted.end(), node) != sorted.end()) continue;
        const std::vector<cudaGraphNode_t> needs = dependencies(node).first;
        const bool ready = std::all_of(needs.begin(), needs.end(),
                                       [&](cudaGraphNode_t need) { return std::find(sorted.begin(), sorted.end(), need) != sorted.end(); });
        if (ready) sorted.push_back(node);
      }
      if (sorted.size() == before) throw std::runtime_error("the captured graph has a cycle");
    }
    nodes_ = sorted;
  }

  template <typename F>
  static F* driver(const char* name, unsigned version) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
    return reinterpret_cast<F*>(function);
  }

  static std::string name(cudaGraphNode_t node) {
    cudaGraphNodeType type{};
    check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    if (type == cudaGraphNodeTypeMemset) return "memset";
    if (type == cudaGraphNodeTypeMemcpy) return "memcpy";
    if (type != cudaGraphNodeTypeKernel) return "node of type " + std::to_string(type);
    // The kernels are another library's: its runtime knows them, ours does not, the driver does.
    static auto* const get_params = driver<CUresult(CUgraphNode, CUDA_KERNEL_NODE_PARAMS*)>("cuGraphKernelNodeGetParams", 12000);
    static auto* const function_name = driver<CUresult(const char**, CUfunction)>("cuFuncGetName", 12030);
    static auto* const kernel_name = driver<CUresult(const char**, CUkernel)>("cuKernelGetName", 12030);
    CUDA_KERNEL_NODE_PARAMS params{};
    const char* mangled = nullptr;
    if (get_params == nullptr || function_name == nullptr || kernel_name == nullptr) return "kernel";
    if (get_params(reinterpret_cast<CUgraphNode>(node), &params) != CUDA_SUCCESS) return "kernel";
    const CUresult named = params.func != nullptr ? function_name(&mangled, params.func) : kernel_name(&mangled, params.kern);
    if (named != CUDA_SUCCESS || mangled == nullptr) return "kernel";
    int status = 0;
    char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string text = status == 0 ? demangled : mangled;
    std::free(demangled);
    for (const char* noise : {"(anonymous namespace)::", "void ", "laprox::", "cuda::"})
      for (size_t at = text.find(noise); at != std::string::npos; at = text.find(noise)) text.erase(at, std::string(noise).size());
    int depth = 0;  // of template arguments
    for (size_t i = 0; i < text.size(); i++) {
      depth += (text[i] == '<') - (text[i] == '>');
      if (depth == 0 && text[i] == '(') return text.substr(0, i);
    }
    return text;
  }

  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  std::vector<cudaGraphNode_t> nodes_;
  std::vector<std::string> names_;
  std::vector<cudaGraph_t> graphs_;
  std::vector<cudaGraphExec_t> runs_;
  std::vector<cudaEvent_t> events_;
};

}  // namespace bench
