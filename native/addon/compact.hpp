// Moves the kept rows of a cache together.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value compact(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
