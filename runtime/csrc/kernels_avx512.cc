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

inline __attribute__((always_inline)) __m512 expand_column(unsigned mask, const float* values) {
  __m512 packed = _mm512_loadu_ps(values);
  __asm__("" : "+v"(packed));  // expanding from memory is slower
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), packed);
}

#include "mask_avx512.h"

#include "kernels_impl.h"
#include "mask_strip.h"

const Kernels kTable = {"avx512",   kLanes,     96,         7, 6, pack_tile, multiply_cell, multiply_cell_by_token,
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
