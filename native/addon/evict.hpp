// Scoring, selecting and compacting in one call on a CPU device.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value evict(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
