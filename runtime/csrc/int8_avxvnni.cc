// Int8 kernels for processors that have VNNI but no AVX-512.
// Switched on here rather than by a flag: older compilers, which do not know it, would refuse to build the library.
#if defined(__AVX2__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#pragma GCC target("avxvnni")
#define MFCOMPILE_AVXVNNI 1
#endif

#include "int8_kernels.h"

#ifdef MFCOMPILE_AVXVNNI
#include <cpuid.h>
#include <immintrin.h>

#define MFCOMPILE_LANES 8

namespace mfcompile {
namespace {

#include "int8_avx2.h"

typedef __m256i Weights;

inline Weights spread(int32_t word) { return _mm256_set1_epi32(word); }

inline Ints dot(Ints sums, const uint32_t* x, Weights weights) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), words, weights));
}

#include "int8_impl.h"

const Int8Kernels kTable = {"avxvnni", kLanes,    7,             20,         0,      find_range,
                            quantize,  pack_tile, multiply_cell, store_tile, store_strip, nullptr};

// Compilers before GCC 13 do not know the name of this feature.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace

const Int8Kernels* int8_avxvnni_kernels() {
  static const bool is_supported = has_avxvnni();
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Int8Kernels* mfcompile::int8_avxvnni_kernels() { return nullptr; }

#endif
