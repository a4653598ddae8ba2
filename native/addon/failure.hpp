// What a call ends with when it cannot be done: a LaproxErrorCode and a sentence. JavaScript sees it as a LaproxError.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "laprox/laprox.h"

namespace laprox::addon {

class Failure : public std::exception {
 public:
  Failure(const char* code, std::string message) : code_(code), message_(std::move(message)) {}
  const char* code() const noexcept { return code_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  const char* code_;  // a literal
  std::string message_;
};

[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(const char* code, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Failure(code, message);
}

inline const char* code_of(lpx_status status) { return status == LPX_CANCELLED ? "ABORTED" : lpx_status_name(status); }

// Throws what the last call of the C ABI on this thread left behind.
inline void check(lpx_status status) {
  if (status != LPX_OK) throw Failure(code_of(status), lpx_last_error());
}

// Whatever was thrown, as a Failure.
inline Failure failure_of(const std::exception_ptr& thrown) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Failure& failure) { return failure; } catch (const std::bad_alloc&) {
    return {"OUT_OF_MEMORY", "the host has not enough memory for this call"};
  } catch (const std::exception& error) { return {"INTERNAL", error.what()}; } catch (...) {
    return {"INTERNAL", "an unknown exception"};
  }
}

}  // namespace laprox::addon
