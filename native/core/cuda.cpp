#include "core/cuda.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "core/status.hpp"

namespace laprox {
namespace {

std::string library_path() {
  if (const char* path = std::getenv("LAPROX_CUDA_PATH"); path != nullptr && *path != '\0') return path;
  constexpr const char* kName = "liblaprox_cuda.so";
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&lpx_abi_version), &info) == 0 || info.dli_fname == nullptr) return kName;
  const std::filesystem::path beside = std::filesystem::path(info.dli_fname).parent_path() / kName;
  std::error_code error;
  return std::filesystem::exists(beside, error) ? beside.string() : kName;
}

CudaLibrary load() {
  CudaLibrary library;
  const std::string path = library_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* error = dlerror();
    library.code = "NOT_BUILT";
    library.reason = "the CUDA backend could not be loaded: " + std::string(error == nullptr ? path : error);
    return library;
  }
  const auto function = reinterpret_cast<lpx_cuda_table_function>(dlsym(handle, LAPROX_CUDA_TABLE_SYMBOL));
  const lpx_cuda_table* table = function == nullptr ? nullptr : function(LAPROX_CUDA_TABLE_VERSION);
  if (table == nullptr || table->version != LAPROX_CUDA_TABLE_VERSION || std::strcmp(table->release, LAPROX_VERSION) != 0) {
    library.code = "ABI_MISMATCH";
    library.reason = path + " belongs to another version of laprox; this one is " LAPROX_VERSION ": build both again";
    return library;
  }
  library.table = table;
  return library;
}

}  // namespace

const CudaLibrary& cuda_library() {
  static const CudaLibrary library = load();
  return library;
}

void relay(const lpx_cuda_table& table, lpx_status status) {
  if (status != LPX_OK) throw Error(status, table.last_error());
}

}  // namespace laprox
