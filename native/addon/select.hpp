// Which entries are kept: from given scores, or straight from a cache.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value select(const Napi::CallbackInfo& info);
Napi::Value select_cache(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
