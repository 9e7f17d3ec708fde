// Kernels for AVX-512 (F, BW, DQ, VL).
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

#define MFCOMPILE_LANES 16

namespace mfcompile {
namespace {

#include "vectors.h"

inline Vector widen(const uint16_t* from) {
  return static_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

#include "transpose_avx512.h"

constexpr int kRowsAtOnce1 = 1, kRowsAtOnce2 = 3;

#define MFCOMPILE_ROWS_BY_TOKEN 1
#include "kernels_impl.h"

#include "activation_impl.h"

inline __m512 load_values(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load_values(const uint16_t* from, __mmask16) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 load_values(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load_values(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

constexpr size_t kAhead = 512;  // entries

// Sixteen columns as bytes, or of six bits; of these only the lowest six bits of every lane count.
inline __attribute__((always_inline)) __m512i load_columns(const uint8_t* from, bool has_six_bits) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  if (!has_six_bits) return _mm512_cvtepu8_epi32(bytes);
  const __m256i places = _mm256_setr_epi8(0, 1, 0, 1, 1, 2, 2, 3, 3, 4, 3, 4, 4, 5, 5, 6,  //
                                          6, 7, 6, 7, 7, 8, 8, 9, 9, 10, 9, 10, 10, 11, 11, 12);
  const __m256i shifts = _mm256_setr_epi16(0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2, 0, 6, 4, 2);
  const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), places);
  return _mm512_cvtepu16_epi32(_mm256_srlv_epi16(pairs, shifts));
}

// Two entries of eight rows at a time: the activations of a block are held in registers, four or six for each token, and
// permutes look up those that the columns name. Blocks of four registers have columns of six bits.
template <int Tokens, int Parts, class Value>
void multiply_rows_by_tokens(const Cell& cell, const float* x, size_t x_stride, float* y, size_t y_stride) {
  __m512 block[Tokens][Parts];
#pragma GCC unroll 4
  for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 6
    for (int part = 0; part < Parts; ++part)
      block[t][part] = _mm512_loadu_ps(x + static_cast<size_t>(t) * x_stride + part * 16);
  }
  const __m512i bit5 = _mm512_set1_epi32(32), bit6 = _mm512_set1_epi32(64);
  const uint8_t* units = cell.units;
  const uint8_t* columns = cell.columns;
  const auto* values = static_cast<const Value*>(cell.values);
  for (size_t group = 0; group < cell.group_count; ++group, units += kGroupRows) {
    size_t left = cell.counts[group];
    __m512 sums[Tokens];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) sums[t] = _mm512_setzero_ps();
    const auto add = [&](__mmask16 lanes, __m512 weight) __attribute__((always_inline)) {
      const __m512i column = load_columns(columns, Parts == 4);
      const __mmask16 is_second = _mm512_test_epi32_mask(column, bit5), is_third = _mm512_test_epi32_mask(column, bit6);
#pragma GCC unroll 4
      for (int t = 0; t < Tokens; ++t) {
        __m512 found = _mm512_permutex2var_ps(block[t][0], column, block[t][1]);
        found = _mm512_mask_mov_ps(found, is_second, _mm512_permutex2var_ps(block[t][2], column, block[t][3]));
        if (Parts == 6) {
          found = _mm512_mask_mov_ps(found, is_third, _mm512_permutex2var_ps(block[t][Parts - 2], column, block[t][Parts - 1]));
        }
        sums[t] =
            lanes == 0xffff ? _mm512_fmadd_ps(weight, found, sums[t]) : _mm512_mask3_fmadd_ps(weight, found, sums[t], lanes);
      }
    };
    for (; left >= 2; left -= 2, columns += 2 * kSlotBytes<Parts == 4>, values += 16) {
      __builtin_prefetch(values + kAhead);
      __builtin_prefetch(columns + kAhead);
      add(0xffff, load_values(values));
    }
    if (left) {  // lanes of the next group are left alone: a product with zero would not be zero for an infinity
      add(0xff, load_values(values, 0xff));
      columns += kSlotBytes<Parts == 4>, values += 8;
    }
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      alignas(32) float rows[8];
      _mm256_store_ps(rows, _mm256_add_ps(_mm512_castps512_ps256(sums[t]), _mm512_extractf32x8_ps(sums[t], 1)));
      float* to = y + static_cast<size_t>(t) * y_stride;
#pragma GCC unroll 8
      for (int row = 0; row < kGroupRows; ++row) to[units[row]] += rows[row];
    }
  }
}

template <int Parts, class Value>
void multiply_rows_of(const Cell& cell, const float* x, size_t x_stride, size_t tokens, float* y, size_t y_stride) {
  for (; tokens >= 2; tokens -= 2, x += 2 * x_stride, y += 2 * y_stride) {
    multiply_rows_by_tokens<2, Parts, Value>(cell, x, x_stride, y, y_stride);
  }
  if (tokens) multiply_rows_by_tokens<1, Parts, Value>(cell, x, x_stride, y, y_stride);
}

void multiply_cell_by_token(int unit_rows, const Cell& cell, const float* x, size_t x_stride, size_t tokens, float* y,
                            size_t y_stride) {
  if (unit_rows == 1) {
    const auto narrow = cell.has_halves ? multiply_rows_of<4, uint16_t> : multiply_rows_of<4, float>;
    const auto wide = cell.has_halves ? multiply_rows_of<6, uint16_t> : multiply_rows_of<6, float>;
    return (cell.has_six_bits ? narrow : wide)(cell, x, x_stride, tokens, y, y_stride);
  }
  for (size_t token = 0; token < tokens; ++token) multiply_strips_by_token(cell, x + token * x_stride, y + token * y_stride);
}

const Kernels kTable = {"avx512",   kLanes,      7,       6, 2, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, block_strip, activate};

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
