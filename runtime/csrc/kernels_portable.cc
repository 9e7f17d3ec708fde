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

#include "kernels_impl.h"
#include "token_impl.h"

const Kernels kTable = {"portable", kLanes,  128,        6, 2, 1, 14, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, nullptr, block_strip};

}  // namespace

const Kernels* portable_kernels() { return &kTable; }

}  // namespace mfcompile
