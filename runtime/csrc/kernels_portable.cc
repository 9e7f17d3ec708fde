// Kernels for any processor: four floats at a time, which the compiler turns into what the baseline has (SSE2, NEON).
#include "kernels.h"

#define MFCOMPILE_LANES 4

namespace mfcompile {
namespace {

inline void transpose_square(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int row = 0; row < 4; ++row) {
    for (int column = 0; column < 4; ++column) to[row * to_stride + column] = from[column * from_stride + row];
  }
}

template <int Tokens>
void mask_columns(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, float* y16) {
  float sums[Tokens][kStripRows] = {};
  for (size_t column = 0; column < columns; ++column) {
    for (unsigned mask = masks[column]; mask; mask &= mask - 1) {
      const int row = __builtin_ctz(mask);
      const float value = *values++;
      for (int t = 0; t < Tokens; ++t) sums[t][row] += value * x[t * x_stride + column];
    }
  }
  __builtin_memcpy(y16, sums, sizeof sums);
}

#include "kernels_impl.h"

const Kernels kTable = {"portable", kLanes, 128, 6, 2, pack_tile, multiply_cell, store_tile, mask_strip, block_strip};

}  // namespace

const Kernels* portable_kernels() { return &kTable; }

}  // namespace mfcompile
