include(CMakeFindDependencyMacro)
find_dependency(Threads)
enable_language(CXX) # a program that links liblaprox.a needs the C++ runtime
include(${CMAKE_CURRENT_LIST_DIR}/laproxTargets.cmake)
