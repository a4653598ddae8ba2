#include "core/status.hpp"

#include <cstdio>

namespace laprox {
namespace {

thread_local char last_error[512] = "";

}  // namespace

void fail(lpx_status status, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(status, message);
}

void set_last_error(const char* message) noexcept { std::snprintf(last_error, sizeof last_error, "%s", message); }

}  // namespace laprox

extern "C" {

const char* lpx_last_error(void) { return laprox::last_error; }

const char* lpx_status_name(lpx_status status) {
  switch (status) {
    case LPX_OK: return "OK";
    case LPX_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case LPX_OUT_OF_BOUNDS: return "OUT_OF_BOUNDS";
    case LPX_OVERLAP: return "OVERLAP";
    case LPX_BUDGET_TOO_SMALL: return "BUDGET_TOO_SMALL";
    case LPX_NON_FINITE: return "NON_FINITE";
    case LPX_OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case LPX_OUT_OF_PAGES: return "OUT_OF_PAGES";
    case LPX_CANCELLED: return "CANCELLED";
    case LPX_UNSUPPORTED: return "UNSUPPORTED";
    case LPX_NO_DEVICE: return "NO_DEVICE";
    case LPX_DEVICE_ERROR: return "DEVICE_ERROR";
    case LPX_INTERNAL: return "INTERNAL";
  }
  return "UNKNOWN";
}

}  // extern "C"
