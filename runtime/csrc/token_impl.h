// One token and single rows, one weight at a time; included inside an anonymous namespace behind kernels_impl.h.
#pragma once

// Rows of one token, side by side: a row's sum is one chain.
template <size_t Rows>
MFCOMPILE_INLINE void multiply_rows_by_token(size_t count, const uint8_t* columns, const float* values, const uint16_t* units,
                                             const float* x, float* y) {
  float sums[Rows] = {};
  size_t entry = 0;
  do {
    MFCOMPILE_UNROLL
    for (size_t row = 0; row < Rows; ++row) sums[row] += x[columns[entry + row * count]] * values[entry + row * count];
  } while (++entry < count);
  MFCOMPILE_UNROLL
  for (size_t row = 0; row < Rows; ++row) y[units[row]] += sums[row];
}

void multiply_cell_by_token(const Cell& cell, const float* x, float* y) {
  constexpr size_t kRows = 4;
  const uint16_t* units = cell.units;
  const uint8_t* columns = cell.columns;
  const float* values = cell.values;
  for (size_t index = 0; index < cell.run_count; ++index) {
    const size_t count = cell.runs[index].count;
    size_t left = cell.runs[index].units;
    for (; left >= kRows; left -= kRows, units += kRows, columns += kRows * count, values += kRows * count) {
      multiply_rows_by_token<kRows>(count, columns, values, units, x, y);
    }
    for (; left; --left, ++units, columns += count, values += count) {
      multiply_rows_by_token<1>(count, columns, values, units, x, y);
    }
  }
}
