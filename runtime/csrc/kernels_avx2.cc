// Kernels for AVX2 with FMA.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <cpuid.h>
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
                x[columns[4]], x[columns[5]], x[columns[6]], x[columns[7]]};  // a gather takes half as long again
}

#include "transpose_avx2.h"

constexpr int kRowsAtOnce1 = 1, kRowsAtOnce2 = 2;

#include "kernels_impl.h"

#include "activation_impl.h"

const Kernels kTable = {"avx2",     kLanes,      6,       3, 1, pack_tile, multiply_cell, multiply_cell_by_token,
                        store_tile, block_strip, activate};

// __builtin_cpu_supports does not know F16C in every compiler.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

}  // namespace

const Kernels* avx2_kernels() {
  static const bool is_supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Kernels* mfcompile::avx2_kernels() { return nullptr; }

#endif
