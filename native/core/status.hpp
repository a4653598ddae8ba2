// Errors inside the core are exceptions; the C ABI turns them into a status and a sentence.
#pragma once

#include <cstdarg>
#include <exception>
#include <string>

#include "laprox/laprox.h"

namespace laprox {

class Error : public std::exception {
 public:
  Error(lpx_status status, std::string message) : status_(status), message_(std::move(message)) {}
  lpx_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  lpx_status status_;
  std::string message_;
};

// Throws an Error with a printf-formatted sentence.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(lpx_status status, const char* format, ...);

// Remembers the sentence for lpx_last_error of this thread.
void set_last_error(const char* message) noexcept;

// Runs `body` and turns whatever it throws into a status.
template <typename Body>
lpx_status guarded(Body&& body) noexcept {
  try {
    set_last_error("");
    body();
    return LPX_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    set_last_error("the host has not enough memory for this call");
    return LPX_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return LPX_INTERNAL;
  } catch (...) {
    set_last_error("an unknown exception");
    return LPX_INTERNAL;
  }
}

// Checks that a caller's struct has the size this library was built with.
template <typename T>
void check_struct(const T* value, const char* name) {
  if (value == nullptr) fail(LPX_INVALID_ARGUMENT, "%s is NULL", name);
  if (value->size != sizeof(T))
    fail(LPX_INVALID_ARGUMENT, "%s->size is %zu; set it to sizeof, which is %zu in this version", name, value->size, sizeof(T));
}

}  // namespace laprox
