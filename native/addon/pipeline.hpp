// Scores, selections and compactions on a GPU: whatever stages a call has, on one stream, without a look from the host in between.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value enqueue(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
