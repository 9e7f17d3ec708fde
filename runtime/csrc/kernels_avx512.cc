// Kernels for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

#define MFCOMPILE_LANES 16

namespace mfcompile {
namespace {

#include "transpose_avx512.h"

inline __attribute__((always_inline)) __m512 expand_column(unsigned mask, const float* values) {
  __m512 packed = _mm512_loadu_ps(values);
  __asm__("" : "+v"(packed));  // expanding from memory is slower
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), packed);
}

#include "mask_avx512.h"

#include "kernels_impl.h"

// Sixteen kept weights of one row at a time: the activations of a block are held in six registers, and permutes look up those
// that the columns name.
void multiply_cell_by_token(const Cell& cell, const float* x, float* sums) {
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16), x2 = _mm512_loadu_ps(x + 32);
  const __m512 x3 = _mm512_loadu_ps(x + 48), x4 = _mm512_loadu_ps(x + 64), x5 = _mm512_loadu_ps(x + 80);
  const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64);
  const uint16_t* units = cell.units;
  const uint8_t* columns = cell.columns;
  const float* values = cell.values;
  for (size_t index = 0; index < cell.run_count; ++index) {
    const size_t count = cell.runs[index].count;
    for (size_t left = cell.runs[index].units; left; --left, ++units, columns += count, values += count) {
      __builtin_prefetch(values + kAhead);
      __builtin_prefetch(values + kAhead + 16);
      __builtin_prefetch(columns + kAhead);
      __m512 sum = _mm512_setzero_ps();
      for (size_t entry = 0; entry < count; entry += kLanes) {
        const __m512i column = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + entry)));
        __m512 found = _mm512_permutex2var_ps(x0, column, x1);
        found = _mm512_mask_mov_ps(found, _mm512_test_epi32_mask(column, bit5), _mm512_permutex2var_ps(x2, column, x3));
        found = _mm512_mask_mov_ps(found, _mm512_test_epi32_mask(column, bit6), _mm512_permutex2var_ps(x4, column, x5));
        // Lanes behind the last entry are left alone: a product with zero would not be zero for an infinity.
        const size_t rest = count - entry;
        const auto lanes = static_cast<__mmask16>(rest >= kLanes ? 0xffffu : (1u << rest) - 1);
        sum = _mm512_mask3_fmadd_ps(_mm512_maskz_loadu_ps(lanes, values + entry), found, sum, lanes);
      }
      // Four sums of a row are kept: sixteen would push the activations out of the L1 cache.
      const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
      const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
      float* row = sums + static_cast<size_t>(*units) * 4;
      _mm_storeu_ps(row, _mm_add_ps(_mm_loadu_ps(row), quarter));
    }
  }
}

#include "mask_strip.h"

const Kernels kTable = {"avx512",   kLanes,     96,         7, 6, 4, 7, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, mask_strip, block_strip};

Kernels best_table() {
  Kernels table = kTable;
  if (MaskStrip* counting = avx512_counting_mask_strip()) table.mask_strip = counting;
  return table;
}

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels table = best_table();
  static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return is_supported ? &table : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Kernels* mfcompile::avx512_kernels() { return nullptr; }

#endif
