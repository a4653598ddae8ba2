// A call whose work is put on a stream of a GPU by the device's thread, which then goes on: the end of the work, wherever the
// stream gets there, settles the call.
#pragma once

#include "addon/exchange.hpp"
#include "addon/job.hpp"

namespace laprox::addon {

class StreamJob : public Job {
 public:
  Outcome execute() noexcept final;
  void wait() noexcept final;
  void abandon() noexcept final;

 protected:
  // Numbers of `streams`: stream, event to wait for, event to record; 0: the device's own, none, none.
  StreamJob(std::shared_ptr<Device> device, Napi::Value held, Napi::Value streams, const char* name);

  // Device thread: puts the work on the stream, results included. Ends with `exchange().receive` where anything comes back.
  virtual void enqueue() = 0;
  // JavaScript thread: results of work that ended well.
  virtual void finish(Napi::Array) {}
  // A sentence for a status that the device left; what is known here.
  virtual std::string explain(lpx_status status) const;

  lpx_device* handle() const { return device().handle(); }
  void* stream() const { return stream_; }
  Exchange& exchange() { return exchange_; }
  const Exchange& exchange() const { return exchange_; }
  // For calls of the C ABI: the stream and the status.
  lpx_call stream_call() const;
  const char* name() const { return name_; }

 private:
  static void on_end(void* job);
  lpx_status run() final { return LPX_INTERNAL; }
  void deliver(Napi::Array held) final;
  // Marks the device as lost where it is; the failure to report.
  Failure device_failure(const std::string& message);

  const char* const name_;
  Exchange exchange_;
  void* stream_;
  void* wait_for_;
  void* record_;
  std::atomic<bool> on_stream_ = false;
};

}  // namespace laprox::addon
