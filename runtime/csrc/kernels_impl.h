// The kernels, written once over vectors of kLanes floats; included by one file for each instruction set, inside an anonymous
// namespace, behind vectors.h and its own transpose_square, widen (kLanes halves) and look_up (x at kLanes columns).
#pragma once

// NOLINTBEGIN: included inside a namespace
inline Vector widen(const float* from) { return load(from); }

// Sums must live in registers: every loop over them is unrolled, also where they are set and stored.
#define MFCOMPILE_UNROLL _Pragma("GCC unroll 16")
#define MFCOMPILE_INLINE inline __attribute__((always_inline))

constexpr int kWidened = 256 * kGroupRows;

// Bytes that the columns of a slot take.
template <bool SixBits>
constexpr size_t kSlotBytes = SixBits ? 6 : kGroupRows;

// Columns of `Rows` lanes of a slot from `row` on, a multiple of Rows. Kernels wait for loads: one brings up to eight columns of
// six bits, and what takes them apart costs nothing beside the multiply-adds.
template <bool SixBits, int Rows>
MFCOMPILE_INLINE void read_columns(const uint8_t* slot, int row, size_t* columns) {
  if (!SixBits) {
    MFCOMPILE_UNROLL
    for (int r = 0; r < Rows; ++r) columns[r] = slot[row + r];
  } else if (Rows == 8) {
    uint64_t bits;
    __builtin_memcpy(&bits, slot, 8);
    MFCOMPILE_UNROLL
    for (int r = 0; r < Rows; ++r) columns[r] = bits >> 6 * r & 63;
  } else {
    uint32_t bits;
    __builtin_memcpy(&bits, slot + row / 4 * 3, 4);
    bits >>= row % 4 * 6;
    MFCOMPILE_UNROLL
    for (int r = 0; r < Rows; ++r) columns[r] = bits >> 6 * r & 63;
  }
}

// `count` values as floats: where they lie, or widened into the buffer.
MFCOMPILE_INLINE const float* widen_all(const void* values, bool has_halves, size_t count, float* buffer) {
  if (!has_halves) return static_cast<const float*>(values);
  const uint16_t* halves = static_cast<const uint16_t*>(values);
  for (size_t index = 0; index < count; index += kLanes) store(buffer + index, widen(halves + index));
  return buffer;
}

// Rows of a group, side by side: one chain of sums would wait for the latency of each multiply-add. `count` is at least 1.
template <int V, int Rows, bool SixBits>
MFCOMPILE_INLINE void multiply_rows(size_t count, const uint8_t* columns, const float* values, int first, const uint8_t* units,
                                    const float* x_block, float* y_tile) {
  constexpr int kWidth = V * kLanes;
  Vector sums[Rows][V] = {};
  do {
    size_t column[Rows];
    read_columns<SixBits, Rows>(columns, first, column);
    MFCOMPILE_UNROLL
    for (int row = 0; row < Rows; ++row) {
      const float* x = x_block + column[row] * kWidth;
      const float value = values[first + row];
      MFCOMPILE_UNROLL
      for (int v = 0; v < V; ++v) sums[row][v] += load(x + v * kLanes) * value;
    }
    columns += kSlotBytes<SixBits>, values += kGroupRows;
  } while (--count);
  MFCOMPILE_UNROLL
  for (int row = 0; row < Rows; ++row) {
    float* y = y_tile + static_cast<size_t>(units[first + row]) * kWidth;
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

MFCOMPILE_INLINE const void* skip(const void* values, bool has_halves, size_t count) {
  return static_cast<const char*>(values) + count * (has_halves ? sizeof(uint16_t) : sizeof(float));
}

template <int V, bool SixBits>
void multiply_cell_of_rows(const Cell& cell, const float* x_block, float* y_tile) {
  constexpr int kRows = V <= kRowsAtOnce1 ? 8 : V <= kRowsAtOnce2 ? 4 : 2;
  alignas(64) float widened[kWidened];
  const uint8_t* columns = cell.columns;
  const void* stored = cell.values;
  for (size_t group = 0; group < cell.group_count; ++group) {
    const size_t count = cell.counts[group], entries = count * kGroupRows;
    const float* values = widen_all(stored, cell.has_halves, entries, widened);
    const uint8_t* units = cell.units + group * kGroupRows;
#ifdef MFCOMPILE_GROUP_OF_8
    if (V == 1) {
      multiply_group<SixBits>(count, columns, values, units, x_block, y_tile);
    } else
#endif
      for (int row = 0; row < kGroupRows; row += kRows) {
        multiply_rows<V, kRows, SixBits>(count, columns, values, row, units, x_block, y_tile);
      }
    columns += count * kSlotBytes<SixBits>;
    stored = skip(stored, cell.has_halves, entries);
  }
}

template <int V>
void multiply_cell_of_4(const Cell& cell, const float* x_block, float* y_tile) {
  alignas(64) float widened[kWidened];
  const uint8_t* columns = cell.columns;
  const void* stored = cell.values;
  for (size_t group = 0; group < cell.group_count; ++group) {
    const size_t count = cell.counts[group];
    const float* values = widen_all(stored, cell.has_halves, 4 * count, widened);
    multiply_strip_of_4<V>(count, columns, values, cell.units[group], x_block, y_tile);
    columns += count;
    stored = skip(stored, cell.has_halves, 4 * count);
  }
}

void multiply_cell(int vectors, int unit_rows, const Cell& cell, const float* x_block, float* y_tile) {
  using Function = void (*)(const Cell&, const float*, float*);
  static const Function of_rows[] = {
      multiply_cell_of_rows<1, false>, multiply_cell_of_rows<2, false>, multiply_cell_of_rows<3, false>,
      multiply_cell_of_rows<4, false>, multiply_cell_of_rows<5, false>, multiply_cell_of_rows<6, false>,
      multiply_cell_of_rows<7, false>, multiply_cell_of_rows<8, false>};
  static const Function of_six_bits[] = {
      multiply_cell_of_rows<1, true>, multiply_cell_of_rows<2, true>, multiply_cell_of_rows<3, true>,
      multiply_cell_of_rows<4, true>, multiply_cell_of_rows<5, true>, multiply_cell_of_rows<6, true>,
      multiply_cell_of_rows<7, true>, multiply_cell_of_rows<8, true>};
  static const Function of_4[] = {multiply_cell_of_4<1>, multiply_cell_of_4<2>, multiply_cell_of_4<3>, multiply_cell_of_4<4>,
                                  multiply_cell_of_4<5>, multiply_cell_of_4<6>, multiply_cell_of_4<7>, multiply_cell_of_4<8>};
  (unit_rows != 1 ? of_4 : cell.has_six_bits ? of_six_bits : of_rows)[vectors - 1](cell, x_block, y_tile);
}

// One token and units of 4 rows: four entries at a time in separate sums.
void multiply_strips_by_token(const Cell& cell, const float* x, float* y) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  alignas(64) float widened[kWidened];
  const uint8_t* columns = cell.columns;
  const void* stored = cell.values;
  for (size_t group = 0; group < cell.group_count; ++group) {
    const size_t count = cell.counts[group];
    const float* values = widen_all(stored, cell.has_halves, 4 * count, widened);
    Four sums[4] = {};
    size_t entry = 0;
    for (; entry + 4 <= count; entry += 4) {
      MFCOMPILE_UNROLL
      for (int way = 0; way < 4; ++way) {
        sums[way] += *reinterpret_cast<const Four*>(values + 4 * (entry + way)) * x[columns[entry + way]];
      }
    }
    for (; entry < count; ++entry) sums[0] += *reinterpret_cast<const Four*>(values + 4 * entry) * x[columns[entry]];
    Four* to = reinterpret_cast<Four*>(y + static_cast<size_t>(cell.units[group]) * 4);
    *to = *to + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    columns += count;
    stored = skip(stored, cell.has_halves, 4 * count);
  }
}

#ifndef MFCOMPILE_ROWS_BY_TOKEN
// One token and single rows: the rows of a group are the lanes.
template <bool SixBits>
void multiply_rows_by_token(const Cell& cell, const float* x, float* y) {
  constexpr int kParts = kGroupRows / kLanes;
  alignas(64) float widened[kWidened];
  const uint8_t* columns = cell.columns;
  const uint8_t* units = cell.units;
  const void* stored = cell.values;
  for (size_t group = 0; group < cell.group_count; ++group, units += kGroupRows) {
    const size_t count = cell.counts[group];
    const float* values = widen_all(stored, cell.has_halves, kGroupRows * count, widened);
    Vector sums[2][kParts] = {};
    const auto add = [&](size_t entry, int way) __attribute__((always_inline)) {
      MFCOMPILE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        size_t column[kLanes];
        read_columns<SixBits, kLanes>(columns + entry * kSlotBytes<SixBits>, part * kLanes, column);
        sums[way][part] += look_up(x, column) * load(values + entry * kGroupRows + part * kLanes);
      }
    };
    size_t entry = 0;
    for (; entry + 2 <= count; entry += 2) add(entry, 0), add(entry + 1, 1);
    if (entry < count) add(entry, 0);
    MFCOMPILE_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const Vector sum = sums[0][part] + sums[1][part];
      MFCOMPILE_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) y[units[part * kLanes + lane]] += sum[lane];
    }
    columns += count * kSlotBytes<SixBits>;
    stored = skip(stored, cell.has_halves, kGroupRows * count);
  }
}

void multiply_cell_by_token(int unit_rows, const Cell& cell, const float* x, size_t x_stride, size_t tokens, float* y,
                            size_t y_stride) {
  const auto of_rows = cell.has_six_bits ? multiply_rows_by_token<true> : multiply_rows_by_token<false>;
  for (size_t token = 0; token < tokens; ++token) {
    (unit_rows == 1 ? of_rows : multiply_strips_by_token)(cell, x + token * x_stride, y + token * y_stride);
  }
}
#endif

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
    } else if (filled) {
      alignas(64) float square[kLanes * kLanes] = {};
      for (; column < square_columns; column += kLanes) {
        for (size_t lane = 0; lane < filled; ++lane) store(square + lane * kLanes, load(x + (first + lane) * columns + column));
        transpose_square(square, kLanes, x_tile + column * width + first, width);
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
template <int Width, int Stride, int Ways, class Value>
MFCOMPILE_INLINE void block_tokens(const uint32_t* columns, const Value* values, size_t count, const float* x, float* y16) {
  Vector sums[Ways][Width][kStripVectors] = {};
  size_t entry = 0;
  for (; entry + Ways <= count; entry += Ways) {
    MFCOMPILE_UNROLL
    for (int way = 0; way < Ways; ++way) {
      const float* token = x + static_cast<size_t>(columns[entry + way]) * Stride;
      MFCOMPILE_UNROLL
      for (int v = 0; v < kStripVectors; ++v) {
        const Vector weight = widen(values + (entry + way) * kStripRows + v * kLanes);
        MFCOMPILE_UNROLL
        for (int t = 0; t < Width; ++t) sums[way][t][v] += weight * token[t];
      }
    }
  }
  for (; entry < count; ++entry) {
    const float* token = x + static_cast<size_t>(columns[entry]) * Stride;
    MFCOMPILE_UNROLL
    for (int v = 0; v < kStripVectors; ++v) {
      const Vector weight = widen(values + entry * kStripRows + v * kLanes);
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

template <int Width, class Value>
void block_width(const uint32_t* columns, const Value* values, size_t count, const float* x, float* y16) {
  constexpr int kAtOnce = Width < kTokensAtOnce ? Width : kTokensAtOnce;
  constexpr int kWays = kAtOnce * kStripVectors >= 8 ? 1 : kAtOnce * kStripVectors >= 4 ? 2 : 4;
  for (int t = 0; t < Width; t += kAtOnce) {
    block_tokens<kAtOnce, Width, kWays>(columns, values, count, x + t, y16 + t * kStripRows);
  }
}

template <class Value>
void block_strip_of(const uint32_t* columns, const Value* values, size_t count, const float* x, int width, float* y16) {
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

void block_strip(const uint32_t* columns, const void* values, bool has_halves, size_t count, const float* x, int width,
                 float* y16) {
  if (has_halves) return block_strip_of(columns, static_cast<const uint16_t*>(values), count, x, width, y16);
  block_strip_of(columns, static_cast<const float*>(values), count, x, width, y16);
}

// NOLINTEND
