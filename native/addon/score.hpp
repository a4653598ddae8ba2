// Scores of every entry of a cache.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value score(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
