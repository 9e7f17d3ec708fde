// The int8 kernels, written once, and compiled without fused multiply-adds, which round differently. Included inside an anonymous
// namespace by one file for each instruction set, which defines before
//   MFCOMPILE_LANES; Ints, a vector of so many int32; transpose_words;
//   Weights, four weights in every lane as `dot` wants them; Weights spread(int32_t);
//   Ints dot(Ints sums, const uint32_t* x, Weights): sums + the products of four activations and weights of each lane.
#pragma once

constexpr int kLanes = MFCOMPILE_LANES;
typedef Ints LooseInts __attribute__((aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(MFCOMPILE_LANES * 4)));
typedef Floats LooseFloats __attribute__((aligned(4), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(MFCOMPILE_LANES)));
typedef Bytes LooseBytes __attribute__((aligned(1), may_alias));

inline Ints load(const int32_t* from) { return *reinterpret_cast<const LooseInts*>(from); }
inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline void store(int32_t* to, Ints value) { *reinterpret_cast<LooseInts*>(to) = value; }
inline void store(float* to, Floats value) { *reinterpret_cast<LooseFloats*>(to) = value; }

#define MFCOMPILE_UNROLL _Pragma("GCC unroll 32")
#define MFCOMPILE_INLINE inline __attribute__((always_inline))

bool find_range(const float* x, size_t count, float* low, float* high) {
  Floats least = {}, most = {};
  Ints largest = {};  // the bits of a magnitude; from 0x7f800000 on it is infinite or no number
  size_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    const Floats value = load(x + index);
    const Ints bits = reinterpret_cast<Ints>(value) & 0x7fffffff;
    least = value < least ? value : least;
    most = value > most ? value : most;
    largest = bits > largest ? bits : largest;
  }
  float lowest = 0, highest = 0;
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    lowest = least[lane] < lowest ? least[lane] : lowest;
    highest = most[lane] > highest ? most[lane] : highest;
    bits = largest[lane] > bits ? largest[lane] : bits;
  }
  bool is_finite = bits < 0x7f800000;
  for (; index < count; ++index) {
    lowest = x[index] < lowest ? x[index] : lowest;
    highest = x[index] > highest ? x[index] : highest;
    is_finite &= x[index] - x[index] == 0.0f;
  }
  *low = lowest, *high = highest;
  return is_finite;
}

// Adding it to a small number rounds to an integer, to even in between, and leaves that integer in the low bits.
constexpr float kRounding = 12582912.0f;
constexpr int32_t kRoundingBits = 0x4b400000;

void quantize(const float* x, size_t count, Quantization by, uint8_t* to) {
  const Floats zeros = {};
  const Floats scale = zeros + by.scale, least = zeros - static_cast<float>(by.zero);
  const Floats most = zeros + (255.0f - static_cast<float>(by.zero));
  size_t index = 0;
  for (; index + kLanes <= count; index += kLanes) {
    Floats value = load(x + index) / scale;
    value = value < least ? least : value;
    value = (value > most ? most : value) + kRounding;
    const Ints rounded = reinterpret_cast<Ints>(value) - (kRoundingBits - by.zero);
    *reinterpret_cast<LooseBytes*>(to + index) = __builtin_convertvector(rounded, Bytes);
  }
  for (; index < count; ++index) {
    float value = x[index] / by.scale;
    value = value < least[0] ? least[0] : value;
    value = (value > most[0] ? most[0] : value) + kRounding;
    int32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    to[index] = static_cast<uint8_t>(bits - (kRoundingBits - by.zero));
  }
}

void pack_tile(const uint32_t* x, size_t stride, size_t groups, size_t tokens, int vectors, uint32_t* x_tile) {
  const size_t width = static_cast<size_t>(vectors) * kLanes, square_groups = groups / kLanes * kLanes;
  for (size_t first = 0; first < width; first += kLanes) {
    const size_t filled = tokens <= first ? 0 : tokens - first < kLanes ? tokens - first : kLanes;
    size_t group = 0;
    if (filled == kLanes) {
      for (; group < square_groups; group += kLanes) {
        transpose_words(x + first * stride + group, stride, x_tile + group * width + first, width);
      }
    }
    for (; group < groups; ++group) {
      uint32_t* to = x_tile + group * width + first;
      for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = lane < filled ? x[(first + lane) * stride + group] : 0;
    }
  }
}

// Rows that keep as many groups, side by side, where few vectors of tokens would wait for the latency of each product.
template <int V, int Rows, bool IsFirst>
MFCOMPILE_INLINE void multiply_rows(size_t count, const uint8_t* groups, const int32_t* words, const uint16_t* rows,
                                    const uint32_t* x_block, int32_t* sums) {
  constexpr int kWidth = V * kLanes;
  Ints own[Rows][V] = {};
  size_t entry = 0;
  do {
    MFCOMPILE_UNROLL
    for (int row = 0; row < Rows; ++row) {
      const uint32_t* x = x_block + groups[entry + row * count] * kWidth;
      const Weights weights = spread(words[entry + row * count]);
      MFCOMPILE_UNROLL
      for (int v = 0; v < V; ++v) own[row][v] = dot(own[row][v], x + v * kLanes, weights);
    }
  } while (++entry < count);
  MFCOMPILE_UNROLL
  for (int row = 0; row < Rows; ++row) {
    int32_t* to = sums + static_cast<size_t>(rows[row]) * kWidth;
    MFCOMPILE_UNROLL
    for (int v = 0; v < V; ++v) store(to + v * kLanes, IsFirst ? own[row][v] : load(to + v * kLanes) + own[row][v]);
  }
}

template <int V, bool IsFirst>
void multiply_cell_of(const Int8Cell& cell, const uint32_t* x_block, int32_t* sums) {
  constexpr size_t kRows = V == 1 ? 4 : V <= 3 ? 2 : 1;
  const uint16_t* rows = cell.rows;
  const uint8_t* groups = cell.groups;
  const int32_t* words = cell.words;
  for (size_t index = 0; index < cell.run_count; ++index) {
    const size_t count = cell.runs[index].count;
    size_t left = cell.runs[index].units;
    if (IsFirst && count == 0) {
      for (; left; --left, ++rows) {
        __builtin_memset(sums + static_cast<size_t>(*rows) * V * kLanes, 0, V * kLanes * sizeof(int32_t));
      }
      break;
    }
    for (; left >= kRows; left -= kRows, rows += kRows, groups += kRows * count, words += kRows * count) {
      multiply_rows<V, kRows, IsFirst>(count, groups, words, rows, x_block, sums);
    }
    for (; kRows > 1 && left; --left, ++rows, groups += count, words += count) {
      multiply_rows<V, 1, IsFirst>(count, groups, words, rows, x_block, sums);
    }
  }
}

template <bool IsFirst>
MFCOMPILE_INLINE void multiply_cell_by_vectors(int vectors, const Int8Cell& cell, const uint32_t* x_block, int32_t* sums) {
  using Function = void (*)(const Int8Cell&, const uint32_t*, int32_t*);
  static const Function of[] = {multiply_cell_of<1, IsFirst>, multiply_cell_of<2, IsFirst>, multiply_cell_of<3, IsFirst>,
                                multiply_cell_of<4, IsFirst>, multiply_cell_of<5, IsFirst>, multiply_cell_of<6, IsFirst>,
                                multiply_cell_of<7, IsFirst>, multiply_cell_of<8, IsFirst>};
  of[vectors - 1](cell, x_block, sums);
}

void multiply_cell(int vectors, bool is_first, const Int8Cell& cell, const uint32_t* x_block, int32_t* sums) {
  if (is_first) return multiply_cell_by_vectors<true>(vectors, cell, x_block, sums);
  multiply_cell_by_vectors<false>(vectors, cell, x_block, sums);
}

// The outputs of one token: sums (rows,) as y (rows,).
MFCOMPILE_INLINE void store_rows(const int32_t* sums, size_t rows, const int32_t* offsets, const float* scales,
                                 const float* bias, float* y) {
  size_t row = 0;
  for (; row + kLanes <= rows; row += kLanes) {
    const Floats value = __builtin_convertvector(load(sums + row) - load(offsets + row), Floats) * load(scales + row);
    store(y + row, value + (bias ? load(bias + row) : Floats{}));
  }
  for (; row < rows; ++row) {
    const uint32_t sum = static_cast<uint32_t>(sums[row]) - static_cast<uint32_t>(offsets[row]);
    y[row] = static_cast<float>(static_cast<int32_t>(sum)) * scales[row] + (bias ? bias[row] : 0.0f);
  }
}

void store_strip(const int32_t* sums, size_t tokens, size_t rows, const int32_t* offsets, const float* scales,
                 const float* bias, float* y, size_t stride) {
  for (size_t token = 0; token < tokens; ++token) {
    store_rows(sums + token * kStripRows, rows, offsets, scales, bias, y + token * stride);
  }
}

// So many rows of a token are stored at once: stores to one token after the other, a line each, wait for memory.
constexpr size_t kStoredRows = 256;

void store_tile(const int32_t* sums, int vectors, size_t tokens, size_t rows, const int32_t* offsets, const float* scales,
                const float* bias, float* y, size_t stride) {
  const size_t width = static_cast<size_t>(vectors) * kLanes;
  alignas(64) int32_t by_token[kLanes * kStoredRows];
  for (size_t row = 0; row < rows; row += kStoredRows) {
    const size_t tall = rows - row < kStoredRows ? rows - row : kStoredRows;
    for (size_t first = 0; first < tokens; first += kLanes) {
      const size_t filled = tokens - first < kLanes ? tokens - first : kLanes;
      size_t r = 0;
      for (; r + kLanes <= tall; r += kLanes) {
        transpose_words(reinterpret_cast<const uint32_t*>(sums) + (row + r) * width + first, width,
                        reinterpret_cast<uint32_t*>(by_token) + r, kStoredRows);
      }
      for (; r < tall; ++r) {
        for (size_t lane = 0; lane < filled; ++lane) by_token[lane * kStoredRows + r] = sums[(row + r) * width + first + lane];
      }
      for (size_t lane = 0; lane < filled; ++lane) {
        store_rows(by_token + lane * kStoredRows, tall, offsets + row, scales + row, bias ? bias + row : nullptr,
                   y + (first + lane) * stride + row);
      }
    }
  }
}
