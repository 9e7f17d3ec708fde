// Vectors of MFCOMPILE_LANES floats; included inside an anonymous namespace, before kernels_impl.h.
#pragma once

constexpr int kLanes = MFCOMPILE_LANES;
typedef float Vector __attribute__((vector_size(MFCOMPILE_LANES * 4)));
typedef float LooseVector __attribute__((vector_size(MFCOMPILE_LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
