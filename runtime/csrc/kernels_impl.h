// The kernels, written once over vectors of MFCOMPILE_LANES floats; included by one file for each instruction set, which
// defines MFCOMPILE_LANES and transpose_square inside an anonymous namespace before.
#pragma once

// NOLINTBEGIN: included inside a namespace
constexpr int kLanes = MFCOMPILE_LANES;
typedef float Vector __attribute__((vector_size(MFCOMPILE_LANES * 4)));
typedef float LooseVector __attribute__((vector_size(MFCOMPILE_LANES * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }

// Sums must live in registers: every loop over them is unrolled, also where they are set and stored.
#define MFCOMPILE_UNROLL _Pragma("GCC unroll 16")
#define MFCOMPILE_INLINE inline __attribute__((always_inline))

// Rows that keep as many columns, side by side: one chain of sums would wait for the latency of each multiply-add.
// `count` is at least 1.
template <int V, int Rows>
MFCOMPILE_INLINE void multiply_rows(size_t count, const uint8_t* columns, const float* values, const uint16_t* units,
                                    const float* x_block, float* y_tile) {
  constexpr int kWidth = V * kLanes;
  Vector sums[Rows][V] = {};
  size_t entry = 0;
  do {
    MFCOMPILE_UNROLL
    for (int row = 0; row < Rows; ++row) {
      const float* x = x_block + columns[entry + row * count] * kWidth;
      const float value = values[entry + row * count];
      MFCOMPILE_UNROLL
      for (int v = 0; v < V; ++v) sums[row][v] += load(x + v * kLanes) * value;
    }
  } while (++entry < count);
  MFCOMPILE_UNROLL
  for (int row = 0; row < Rows; ++row) {
    float* y = y_tile + static_cast<size_t>(units[row]) * kWidth;
    MFCOMPILE_UNROLL
    for (int v = 0; v < V; ++v) store(y + v * kLanes, load(y + v * kLanes) + sums[row][v]);
  }
}

// Four rows that keep the same columns: every load of x serves four multiply-adds.
template <int V>
MFCOMPILE_INLINE void multiply_strip_of_4(size_t count, const uint8_t* columns, const float* values, size_t unit,
                                          const float* x_block, float* y_tile) {
  constexpr int kWidth = V * kLanes;
  Vector sums[4][V] = {};
  size_t entry = 0;
  do {
    const float* x = x_block + columns[entry] * kWidth;
    const float* value = values + 4 * entry;
    MFCOMPILE_UNROLL
    for (int v = 0; v < V; ++v) {
      const Vector token = load(x + v * kLanes);
      MFCOMPILE_UNROLL
      for (int row = 0; row < 4; ++row) sums[row][v] += token * value[row];
    }
  } while (++entry < count);
  MFCOMPILE_UNROLL
  for (int row = 0; row < 4; ++row) {
    float* y = y_tile + (unit * 4 + row) * kWidth;
    MFCOMPILE_UNROLL
    for (int v = 0; v < V; ++v) store(y + v * kLanes, load(y + v * kLanes) + sums[row][v]);
  }
}

template <int V>
void multiply_cell_of_rows(const Cell& cell, const float* x_block, float* y_tile) {
  constexpr size_t kRows = V <= 2 ? 4 : 2;
  const uint16_t* units = cell.units;
  const uint8_t* columns = cell.columns;
  const float* values = cell.values;
  for (size_t index = 0; index < cell.run_count; ++index) {
    const size_t count = cell.runs[index].count;
    size_t left = cell.runs[index].units;
    for (; left >= kRows; left -= kRows, units += kRows, columns += kRows * count, values += kRows * count) {
      multiply_rows<V, kRows>(count, columns, values, units, x_block, y_tile);
    }
    for (; left; --left, ++units, columns += count, values += count) {
      multiply_rows<V, 1>(count, columns, values, units, x_block, y_tile);
    }
  }
}

template <int V>
void multiply_cell_of_4(const Cell& cell, const float* x_block, float* y_tile) {
  const uint16_t* units = cell.units;
  const uint8_t* columns = cell.columns;
  const float* values = cell.values;
  for (size_t index = 0; index < cell.run_count; ++index) {
    const size_t count = cell.runs[index].count;
    for (size_t left = cell.runs[index].units; left; --left, ++units, columns += count, values += 4 * count) {
      multiply_strip_of_4<V>(count, columns, values, *units, x_block, y_tile);
    }
  }
}

void multiply_cell(int vectors, int unit_rows, const Cell& cell, const float* x_block, float* y_tile) {
  using Function = void (*)(const Cell&, const float*, float*);
  static const Function of_rows[] = {multiply_cell_of_rows<1>, multiply_cell_of_rows<2>, multiply_cell_of_rows<3>,
                                     multiply_cell_of_rows<4>, multiply_cell_of_rows<5>, multiply_cell_of_rows<6>,
                                     multiply_cell_of_rows<7>, multiply_cell_of_rows<8>};
  static const Function of_4[] = {multiply_cell_of_4<1>, multiply_cell_of_4<2>, multiply_cell_of_4<3>, multiply_cell_of_4<4>,
                                  multiply_cell_of_4<5>, multiply_cell_of_4<6>, multiply_cell_of_4<7>, multiply_cell_of_4<8>};
  (unit_rows == 1 ? of_rows : of_4)[vectors - 1](cell, x_block, y_tile);
}

void pack_tile(const float* x, size_t columns, size_t tokens, int vectors, float* x_tile, float* suspect) {
  const size_t width = static_cast<size_t>(vectors) * kLanes;
  const size_t square_columns = columns / kLanes * kLanes;
  for (int v = 0; v < vectors; ++v) {
    const size_t first = static_cast<size_t>(v) * kLanes;
    const size_t filled = tokens <= first ? 0 : tokens - first < kLanes ? tokens - first : kLanes;
    size_t column = 0;
    if (filled == kLanes) {
      for (; column < square_columns; column += kLanes) {
        transpose_square(x + first * columns + column, columns, x_tile + column * width + first, width);
      }
    }
    for (; column < columns; ++column) {
      float* to = x_tile + column * width + first;
      for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = lane < filled ? x[(first + lane) * columns + column] : 0.0f;
    }
    // 0 * x is 0 for every finite x and NaN otherwise, so this sum marks the tokens that hold a NaN or an infinity.
    Vector sum[2] = {};
    size_t row = 0;
    for (; row + 2 <= columns; row += 2) {
      sum[0] += load(x_tile + row * width + first) * 0.0f;
      sum[1] += load(x_tile + (row + 1) * width + first) * 0.0f;
    }
    if (row < columns) sum[0] += load(x_tile + row * width + first) * 0.0f;
    store(suspect + first, sum[0] + sum[1]);
  }
}

void store_tile(const float* y_tile, int vectors, size_t tokens, size_t rows, const float* bias, float* y, size_t stride) {
  const size_t width = static_cast<size_t>(vectors) * kLanes;
  alignas(64) float square[kLanes * kLanes];
  for (size_t first = 0; first < tokens; first += kLanes) {
    const size_t filled = tokens - first < kLanes ? tokens - first : kLanes;
    for (size_t row = 0; row < rows; row += kLanes) {
      const size_t tall = rows - row < kLanes ? rows - row : kLanes;
      if (tall == kLanes) {
        transpose_square(y_tile + row * width + first, width, square, kLanes);
        const Vector add = bias ? load(bias + row) : Vector{};
        for (size_t lane = 0; lane < filled; ++lane) {
          store(y + (first + lane) * stride + row, load(square + lane * kLanes) + add);
        }
      } else {
        for (size_t lane = 0; lane < filled; ++lane) {
          for (size_t r = 0; r < tall; ++r) {
            y[(first + lane) * stride + row + r] = y_tile[(row + r) * width + first + lane] + (bias ? bias[row + r] : 0.0f);
          }
        }
      }
    }
  }
}

constexpr int kStripVectors = kStripRows / kLanes;

// Width tokens of 16 rows; Ways entries at a time in separate sums, so that few tokens do not wait for one chain.
template <int Width, int Stride, int Ways>
MFCOMPILE_INLINE void block_tokens(const uint32_t* columns, const float* values, size_t count, const float* x, float* y16) {
  Vector sums[Ways][Width][kStripVectors] = {};
  size_t entry = 0;
  for (; entry + Ways <= count; entry += Ways) {
    MFCOMPILE_UNROLL
    for (int way = 0; way < Ways; ++way) {
      const float* token = x + static_cast<size_t>(columns[entry + way]) * Stride;
      MFCOMPILE_UNROLL
      for (int v = 0; v < kStripVectors; ++v) {
        const Vector weight = load(values + (entry + way) * kStripRows + v * kLanes);
        MFCOMPILE_UNROLL
        for (int t = 0; t < Width; ++t) sums[way][t][v] += weight * token[t];
      }
    }
  }
  for (; entry < count; ++entry) {
    const float* token = x + static_cast<size_t>(columns[entry]) * Stride;
    MFCOMPILE_UNROLL
    for (int v = 0; v < kStripVectors; ++v) {
      const Vector weight = load(values + entry * kStripRows + v * kLanes);
      MFCOMPILE_UNROLL
      for (int t = 0; t < Width; ++t) sums[0][t][v] += weight * token[t];
    }
  }
  MFCOMPILE_UNROLL
  for (int t = 0; t < Width; ++t) {
    MFCOMPILE_UNROLL
    for (int v = 0; v < kStripVectors; ++v) {
      Vector sum = sums[0][t][v];
      MFCOMPILE_UNROLL
      for (int way = 1; way < Ways; ++way) sum += sums[way][t][v];
      store(y16 + t * kStripRows + v * kLanes, sum);
    }
  }
}

// Tokens that fit the registers beside one strip of rows: 16, 4 and 2 tokens for vectors of 16, 8 and 4 floats.
constexpr int kTokensAtOnce = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;

template <int Width>
void block_width(const uint32_t* columns, const float* values, size_t count, const float* x, float* y16) {
  constexpr int kAtOnce = Width < kTokensAtOnce ? Width : kTokensAtOnce;
  constexpr int kWays = kAtOnce * kStripVectors >= 8 ? 1 : kAtOnce * kStripVectors >= 4 ? 2 : 4;
  for (int t = 0; t < Width; t += kAtOnce) {
    block_tokens<kAtOnce, Width, kWays>(columns, values, count, x + t, y16 + t * kStripRows);
  }
}

void block_strip(const uint32_t* columns, const float* values, size_t count, const float* x, int width, float* y16) {
  switch (width) {
    case 1:
      return block_width<1>(columns, values, count, x, y16);
    case 2:
      return block_width<2>(columns, values, count, x, y16);
    case 4:
      return block_width<4>(columns, values, count, x, y16);
    case 8:
      return block_width<8>(columns, values, count, x, y16);
    default:
      return block_width<kBlockTokens>(columns, values, count, x, y16);
  }
}

// NOLINTEND
