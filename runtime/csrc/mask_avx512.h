// Few tokens with AVX-512; included inside an anonymous namespace by files that define expand_column(mask, values), the packed
// values of one column in the rows that keep it, before.
#pragma once

constexpr size_t kAhead = 256;  // floats

template <int Tokens>
void mask_columns(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, float* y16) {
  constexpr int kWays = Tokens == 1 ? 4 : Tokens <= 4 ? 2 : 1;  // separate sums, so that few tokens do not wait for one chain
  __m512 sums[kWays][Tokens];
#pragma GCC unroll 8
  for (int way = 0; way < kWays; ++way) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) sums[way][t] = _mm512_setzero_ps();
  }
  size_t column = 0;
  for (; column + kWays <= columns; column += kWays) {
    __builtin_prefetch(values + kAhead);  // a tenth faster where weights come from memory, and the same elsewhere
    if (kWays == 4) __builtin_prefetch(values + kAhead + 16);
#pragma GCC unroll 4
    for (int way = 0; way < kWays; ++way) {
      unsigned mask = masks[column + way];
      __asm__("" : "+r"(mask));  // counted in 32 bits: in 16 bits, each count would wait for the one before
      const __m512 weight = expand_column(mask, values);
      values += __builtin_popcount(mask);
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        sums[way][t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[t * x_stride + column + way]), sums[way][t]);
      }
    }
  }
  for (; column < columns; ++column) {
    const __m512 weight = expand_column(masks[column], values);
    values += __builtin_popcount(masks[column]);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) sums[0][t] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[t * x_stride + column]), sums[0][t]);
  }
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) {
    __m512 sum = sums[0][t];
#pragma GCC unroll 4
    for (int way = 1; way < kWays; ++way) sum = _mm512_add_ps(sum, sums[way][t]);
    _mm512_storeu_ps(y16 + t * kStripRows, sum);
  }
}
