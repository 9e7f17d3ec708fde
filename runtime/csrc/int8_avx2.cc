// Int8 kernels for AVX2, exact: vpmaddubsw would saturate, so bytes are widened to 16 bits, odd and even ones apart.
#include "int8_kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>

#define MFCOMPILE_LANES 8

namespace mfcompile {
namespace {

#include "int8_avx2.h"

struct Weights {
  __m256i even, odd;
};

inline Weights spread(int32_t word) {
  const __m256i words = _mm256_set1_epi32(word);
  return {_mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8), _mm256_srai_epi16(words, 8)};
}

inline Ints dot(Ints sums, const uint32_t* x, const Weights& weights) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(words, _mm256_set1_epi16(255)), weights.even);
  return sums + reinterpret_cast<Ints>(even) +
         reinterpret_cast<Ints>(_mm256_madd_epi16(_mm256_srli_epi16(words, 8), weights.odd));
}

#include "int8_impl.h"

const Int8Kernels kTable = {"avx2",   kLanes,    4,             70,         0,      find_range,
                            quantize, pack_tile, multiply_cell, store_tile, store_strip, nullptr};

}  // namespace

const Int8Kernels* int8_avx2_kernels() {
  static const bool is_supported = __builtin_cpu_supports("avx2");
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Int8Kernels* mfcompile::int8_avx2_kernels() { return nullptr; }

#endif
