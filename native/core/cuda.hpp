// liblaprox_cuda, loaded at run time from the folder of the core.
#pragma once

#include <string>

#include "core/cuda_table.h"

namespace laprox {

struct CudaLibrary {
  const lpx_cuda_table* table = nullptr;
  std::string code;  // why there is no table: NOT_BUILT or ABI_MISMATCH
  std::string reason;
};

// Looked for once a process: at LAPROX_CUDA_PATH where that is set, else beside the core.
const CudaLibrary& cuda_library();

// Throws what the table's function left as its error.
void relay(const lpx_cuda_table& table, lpx_status status);

}  // namespace laprox
