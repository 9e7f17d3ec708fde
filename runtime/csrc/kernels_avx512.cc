// Kernels for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

#define MFCOMPILE_LANES 16

namespace mfcompile {
namespace {

inline void transpose_square(const float* from, size_t from_stride, float* to, size_t to_stride) {
  __m512 row[16], pair[16];
  for (int i = 0; i < 16; ++i) row[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // row[i + c]: column c of each 128-bit lane, of four rows
    row[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(row[c], row[4 + c], 0x88), odd = _mm512_shuffle_f32x4(row[c], row[4 + c], 0xdd);
    const __m512 even2 = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0x88);
    const __m512 odd2 = _mm512_shuffle_f32x4(row[8 + c], row[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * to_stride, _mm512_shuffle_f32x4(even, even2, 0x88));
    _mm512_storeu_ps(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
    _mm512_storeu_ps(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even, even2, 0xdd));
    _mm512_storeu_ps(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
  }
}

template <int Tokens>
void mask_columns(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, float* y16) {
  constexpr int kWays = Tokens == 1 ? 4 : Tokens <= 4 ? 2 : 1;
  __m512 sums[kWays][Tokens];
  for (auto& way : sums) {
    for (auto& token : way) token = _mm512_setzero_ps();
  }
  const auto add = [&](int way, size_t column) __attribute__((always_inline)) {
    const unsigned mask = masks[column];
    __m512 packed = _mm512_loadu_ps(values);
    __asm__("" : "+v"(packed));  // expanding from memory is many times slower on some processors
    const __m512 weight = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), packed);
    values += __builtin_popcount(mask);
    for (int t = 0; t < Tokens; ++t) {
      sums[way][t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[t * x_stride + column]), sums[way][t]);
    }
  };
  size_t column = 0;
  for (; column + kWays <= columns; column += kWays) {
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) add(way, column + way);
  }
  for (; column < columns; ++column) add(0, column);
  for (int t = 0; t < Tokens; ++t) {
    __m512 sum = sums[0][t];
    for (int way = 1; way < kWays; ++way) sum = _mm512_add_ps(sum, sums[way][t]);
    _mm512_storeu_ps(y16 + t * kStripRows, sum);
  }
}

#include "kernels_impl.h"

const Kernels kTable = {"avx512", kLanes, 64, 6, 6, pack_tile, multiply_cell, store_tile, mask_strip, block_strip};

}  // namespace

const Kernels* avx512_kernels() {
  static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Kernels* mfcompile::avx512_kernels() { return nullptr; }

#endif
