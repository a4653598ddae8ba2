// How far the outputs of the layers move where only a selection is kept.
#pragma once

#include "napi.h"

namespace laprox::addon {

Napi::Value fidelity(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
