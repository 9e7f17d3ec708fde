// Int8 kernels for AVX-512 with VNNI.
#include "int8_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#define MFCOMPILE_LANES 16

namespace mfcompile {
namespace {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef __m512i Weights;

inline Weights spread(int32_t word) { return _mm512_set1_epi32(word); }

inline Ints dot(Ints sums, const uint32_t* x, Weights weights) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), _mm512_loadu_si512(x), weights));
}

#include "transpose_avx512.h"

inline void transpose_words(const uint32_t* from, size_t from_stride, uint32_t* to, size_t to_stride) {
  transpose_square(reinterpret_cast<const float*>(from), from_stride, reinterpret_cast<float*>(to), to_stride);
}

#include "int8_impl.h"

constexpr int kMaskTokens = 24;
constexpr size_t kAhead = 256;  // words

constexpr int stride_of(int tokens) { return tokens <= 8 ? tokens : (tokens + kLanes - 1) / kLanes * kLanes; }

// A group of 16 rows at a time: the words of the rows that keep it are expanded in a register and serve all tokens.
template <int Tokens>
void mask_groups(const uint16_t* masks, const int32_t* words, size_t groups, const uint32_t* x, int32_t* sums) {
  constexpr int kWays = Tokens == 1 ? 4 : Tokens <= 3 ? 2 : 1;  // separate sums, so that few tokens do not wait for one chain
  __m512i own[kWays][Tokens];
  MFCOMPILE_UNROLL
  for (int way = 0; way < kWays; ++way) {
    MFCOMPILE_UNROLL
    for (int t = 0; t < Tokens; ++t) own[way][t] = _mm512_setzero_si512();
  }
  const auto add = [&](int way, size_t group) __attribute__((always_inline)) {
    unsigned mask = masks[group];
    __asm__("" : "+r"(mask));  // counted in 32 bits: in 16 bits, each count would wait for the one before
    __m512i packed = _mm512_loadu_si512(words);
    __asm__("" : "+v"(packed));  // expanding from memory is slower
    const __m512i weights = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), packed);
    words += __builtin_popcount(mask);
    const uint32_t* token = x + group * stride_of(Tokens);
    MFCOMPILE_UNROLL
    for (int t = 0; t < Tokens; ++t) {
      own[way][t] = _mm512_dpbusd_epi32(own[way][t], _mm512_set1_epi32(static_cast<int32_t>(token[t])), weights);
    }
  };
  size_t group = 0;
  for (; group + kWays <= groups; group += kWays) {
    if (Tokens <= 8) __builtin_prefetch(words + kAhead);
    MFCOMPILE_UNROLL
    for (int way = 0; way < kWays; ++way) add(way, group + static_cast<size_t>(way));
  }
  for (; group < groups; ++group) add(0, group);
  MFCOMPILE_UNROLL
  for (int t = 0; t < Tokens; ++t) {
    __m512i sum = own[0][t];
    MFCOMPILE_UNROLL
    for (int way = 1; way < kWays; ++way) sum = _mm512_add_epi32(sum, own[way][t]);
    _mm512_storeu_si512(sums + t * kStripRows, sum);
  }
}

template <int... Index>
struct MaskStrips {
  static constexpr Int8MaskStrip* of[] = {mask_groups<Index + 1>...};
};
template <int Count, int... Index>
struct MakeMaskStrips : MakeMaskStrips<Count - 1, Count - 1, Index...> {};
template <int... Index>
struct MakeMaskStrips<0, Index...> : MaskStrips<Index...> {};

Int8MaskStrip* mask_strip(int tokens, int* stride) {
  *stride = stride_of(tokens);
  return MakeMaskStrips<kMaskTokens>::of[tokens - 1];
}

const Int8Kernels kTable = {"avx512", kLanes,    7,             15,         kMaskTokens, find_range,
                            quantize, pack_tile, multiply_cell, store_tile, store_strip, mask_strip};

}  // namespace

const Int8Kernels* int8_avx512_kernels() {
  static const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("avx512vnni");
  return is_supported ? &kTable : nullptr;
}

}  // namespace mfcompile

#else

const mfcompile::Int8Kernels* mfcompile::int8_avx512_kernels() { return nullptr; }

#endif
