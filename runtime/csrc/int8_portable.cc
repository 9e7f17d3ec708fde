// Int8 kernels for any processor: four tokens at a time.
#include "int8_kernels.h"

#define MFCOMPILE_LANES 4

namespace mfcompile {
namespace {

typedef int32_t Ints __attribute__((vector_size(16)));
typedef Ints IntsIn __attribute__((aligned(4), may_alias));

struct Weights {
  int32_t of[4];
};

inline Weights spread(int32_t word) {
  const auto bits = static_cast<uint32_t>(word);
  return {{static_cast<int8_t>(bits), static_cast<int8_t>(bits >> 8), static_cast<int8_t>(bits >> 16),
           static_cast<int8_t>(bits >> 24)}};
}

inline Ints dot(Ints sums, const uint32_t* x, const Weights& weights) {
  const Ints words = *reinterpret_cast<const IntsIn*>(x);
  sums += (words & 255) * weights.of[0];
  sums += (words >> 8 & 255) * weights.of[1];
  sums += (words >> 16 & 255) * weights.of[2];
  return sums + (words >> 24 & 255) * weights.of[3];
}

inline void transpose_words(const uint32_t* from, size_t from_stride, uint32_t* to, size_t to_stride) {
  for (int row = 0; row < 4; ++row) {
    for (int column = 0; column < 4; ++column) to[row * to_stride + column] = from[column * from_stride + row];
  }
}

#include "int8_impl.h"

const Int8Kernels kTable = {"portable", kLanes,    6,         300,          0,          find_range,
                            quantize,   pack_tile, multiply_cell, store_tile, store_strip, nullptr};

}  // namespace

const Int8Kernels* int8_portable_kernels() { return &kTable; }

}  // namespace mfcompile
