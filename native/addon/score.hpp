// Scores of every entry of a cache, and norms of its values.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value score(const Napi::CallbackInfo& info);
Napi::Value value_norms(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
