// What the kernels of 8 tokens share; included inside an anonymous namespace before int8_impl.h.
#pragma once

typedef int32_t Ints __attribute__((vector_size(32)));

#include "transpose_avx2.h"

inline void transpose_words(const uint32_t* from, size_t from_stride, uint32_t* to, size_t to_stride) {
  transpose_square(reinterpret_cast<const float*>(from), from_stride, reinterpret_cast<float*>(to), to_stride);
}
