// Kernels for AVX2 with FMA.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#define MFCOMPILE_LANES 8

namespace mfcompile {
namespace {

#include "transpose_avx2.h"

// For every mask of 8 rows: which packed value each row takes, and all ones where it takes any.
struct Expansion {
  alignas(64) uint8_t source[256][8];
  alignas(64) int8_t kept[256][8];
  constexpr Expansion() : source{}, kept{} {
    for (int mask = 0; mask < 256; ++mask) {
      for (int row = 0, next = 0; row < 8; ++row) {
        const bool is_kept = (mask >> row & 1) != 0;
        source[mask][row] = static_cast<uint8_t>(is_kept ? next++ : 0);
        kept[mask][row] = is_kept ? -1 : 0;
      }
    }
  }
};
constexpr Expansion kExpansion;  // made by the compiler: nothing of this file may run where AVX2 is missing

inline __m256 expand(unsigned mask, const float* values) {
  const __m256i source = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpansion.source[mask])));
  const __m256i kept = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpansion.kept[mask])));
  return _mm256_and_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(values), source), _mm256_castsi256_ps(kept));
}

template <int Tokens>
void mask_columns(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, float* y16) {
  constexpr int kWays = Tokens <= 2 ? 2 : 1;
  __m256 sums[kWays][Tokens][2];
  for (auto& way : sums) {
    for (auto& token : way) token[0] = token[1] = _mm256_setzero_ps();
  }
  const auto add = [&](int way, size_t column) {
    const unsigned low = masks[column] & 255u, high = masks[column] >> 8;
    const __m256 first = expand(low, values);
    values += __builtin_popcount(low);
    const __m256 second = expand(high, values);
    values += __builtin_popcount(high);
    for (int t = 0; t < Tokens; ++t) {
      const __m256 token = _mm256_broadcast_ss(x + t * x_stride + column);
      sums[way][t][0] = _mm256_fmadd_ps(first, token, sums[way][t][0]);
      sums[way][t][1] = _mm256_fmadd_ps(second, token, sums[way][t][1]);
    }
  };
  size_t column = 0;
  for (; column + kWays <= columns; column += kWays) {
    for (int way = 0; way < kWays; ++way) add(way, column + way);
  }
  for (; column < columns; ++column) add(0, column);
  for (int t = 0; t < Tokens; ++t) {
    for (int half = 0; half < 2; ++half) {
      __m256 sum = sums[0][t][half];
      for (int way = 1; way < kWays; ++way) sum = _mm256_add_ps(sum, sums[way][t][half]);
      _mm256_storeu_ps(y16 + t * kStripRows + half * 8, sum);
    }
  }
}

#include "kernels_impl.h"
#include "token_impl.h"
#include "mask_strip.h"

const Kernels kTable = {"avx2",     kLanes,     128,        6, 3, 1, 14, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, mask_strip, block_strip};

}  // namespace

const Kernels* avx2_kernels() {
  static const bool is_supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Kernels* mfcompile::avx2_kernels() { return nullptr; }

#endif
