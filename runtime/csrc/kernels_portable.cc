// Kernels for any processor: four floats at a time, which the compiler turns into what the baseline has (SSE2, NEON).
#include "half.h"
#include "kernels.h"

#define MFCOMPILE_LANES 4

namespace mfcompile {
namespace {

#include "vectors.h"

inline Vector widen(const uint16_t* from) {
  return Vector{half_to_float(from[0]), half_to_float(from[1]), half_to_float(from[2]), half_to_float(from[3])};
}

inline Vector look_up(const float* x, const size_t* columns) {
  return Vector{x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]]};
}

inline void transpose_square(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int row = 0; row < 4; ++row) {
    for (int column = 0; column < 4; ++column) to[row * to_stride + column] = from[column * from_stride + row];
  }
}

constexpr int kRowsAtOnce1 = 0, kRowsAtOnce2 = 2;

#include "kernels_impl.h"

#include "activation_impl.h"

const Kernels kTable = {"portable", kLanes,      6,       2, 1, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, block_strip, activate};

}  // namespace

const Kernels* portable_kernels() { return &kTable; }

}  // namespace mfcompile
