// Kernels for AVX-512 with vectors of eight floats: for up to eight tokens, and with twice the registers of AVX2.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>

#define MFCOMPILE_LANES 8

namespace mfcompile {
namespace {

#include "vectors.h"

inline Vector widen(const uint16_t* from) {
  return static_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline Vector look_up(const float* x, const size_t* columns) {
  return Vector{x[columns[0]], x[columns[1]], x[columns[2]], x[columns[3]],
                x[columns[4]], x[columns[5]], x[columns[6]], x[columns[7]]};
}

#include "transpose_avx2.h"

constexpr int kRowsAtOnce1 = 1, kRowsAtOnce2 = 2;

#define MFCOMPILE_GROUP_OF_8 1
template <bool SixBits>
inline __attribute__((always_inline)) void multiply_group(size_t count, const uint8_t* columns, const float* values,
                                                          const uint8_t* units, const float* x_block, float* y_tile);

#include "kernels_impl.h"

// Eight rows and eight tokens. One load brings the values of all rows, and permutes spread them, so that the loads are left to
// the activations.
template <bool SixBits>
void multiply_group(size_t count, const uint8_t* columns, const float* values, const uint8_t* units, const float* x_block,
                    float* y_tile) {
  __m256 sums[8];
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) sums[row] = _mm256_setzero_ps();
  do {
    const __m256 weights = _mm256_loadu_ps(values);
    size_t column[8];
    read_columns<SixBits, 8>(columns, 0, column);
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row) {
      const __m256 weight = _mm256_permutexvar_ps(_mm256_set1_epi32(row), weights);
      sums[row] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x_block + column[row] * 8), sums[row]);
    }
    columns += kSlotBytes<SixBits>, values += 8;
  } while (--count);
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) {
    float* y = y_tile + static_cast<size_t>(units[row]) * 8;
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_loadu_ps(y), sums[row]));
  }
}

#include "activation_impl.h"

const Kernels kTable = {"avx512",   kLanes,      6,       3, 1, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, block_strip, activate};

}  // namespace

const Kernels* avx512_narrow_kernels() { return avx512_kernels() ? &kTable : nullptr; }

}  // namespace mfcompile

#else

const mfcompile::Kernels* mfcompile::avx512_narrow_kernels() { return nullptr; }

#endif
