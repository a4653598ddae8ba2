// Which kernels a device uses.
#pragma once

namespace laprox::cuda {

// kAuto: the fastest that serves the geometry. The others are for tests: kernels that serve any geometry, those of every chip
// from compute capability 8.0, and those of compute capability 9.0.
enum class Path { kAuto, kPlain, kPortable, kHopper };

}  // namespace laprox::cuda
