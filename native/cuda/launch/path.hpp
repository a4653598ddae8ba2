// Which kernels a device uses.
#pragma once

namespace laprox::cuda {

// Kernels of compute capability 9.0, of every chip from 8.0, or those that serve any geometry: the fastest that the chip has, unless tests ask for
// others. Where a kernel does not serve a geometry the next one does.
enum class Path { kPlain, kPortable, kHopper };

}  // namespace laprox::cuda
