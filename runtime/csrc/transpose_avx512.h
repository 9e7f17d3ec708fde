// Squares of 16 x 16 values of four bytes with AVX-512; included inside an anonymous namespace.
#pragma once

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
