// The layouts that kernels read, made from a packed weight when its session is created.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "packed.h"
#include "weight_memory.h"

namespace mfcompile {

// Rows are cut into chunks (the rows of one task), columns into blocks. In each cell the units (rows, or strips of 4 rows that
// share columns) are sorted by how much they keep and put into groups, whose units are brought to one length by zeros at pruned
// places: at most about a fiftieth more. A value for each entry and a column, six bits of single rows in narrow blocks and
// otherwise a byte; and a byte for each unit of a cell.
struct CellLayout {
  int unit_rows;
  int group_units;
  size_t block_columns;
  size_t chunk_rows;
  size_t chunks;
  size_t blocks;
  ValueType value_type;
  bool has_six_bits;                             // eight columns in six bytes, the first in the lowest bits
  WeightArray<size_t> first_group, first_entry;  // of every cell (chunk, block), and one behind the last
  WeightArray<uint8_t> counts, units, columns;
  WeightArray<char> values;

  // values: (entries, unit_rows) of value_type.
  CellLayout(const Entries& entries, const void* values, ValueType value_type, int unit_rows, size_t rows);
  Cell cell(size_t chunk, size_t block) const;
  size_t bytes() const;
  size_t column_of(const Cell& cell, size_t entry) const;

  // Calls visit(row, column) for every weight that is not zero.
  template <class Visit>
  void for_each_kept(size_t rows, Visit visit) const;
};

// The pattern 16x1: the columns that a strip of 16 rows keeps, with 16 values each.
struct BlockLayout {
  size_t strips;
  ValueType value_type;
  WeightArray<size_t> first_block;  // of every strip, and one behind the last
  WeightArray<uint32_t> columns;
  WeightArray<char> values;  // (blocks, 16)

  BlockLayout(const Entries& entries, const void* values, ValueType value_type);
  size_t bytes() const { return first_block.bytes() + columns.bytes() + values.bytes(); }

  template <class Visit>
  void for_each_kept(size_t rows, Visit visit) const;
};

// How many rows share their columns, found in the weight itself: 16, 4 or 1. The largest height is taken at which at most a
// twentieth of the values in kept blocks are missing.
int find_unit_rows(const Entries& rows, const PackedWeight& weight);

// Strips of rows in place of rows: entries are the columns that any row of a strip keeps.
struct Strips {
  Entries entries;
  std::vector<char> values;  // (entries, unit_rows), zero where a row has no entry
};
Strips make_strips(const Entries& rows, const PackedWeight& weight, int unit_rows);

inline size_t CellLayout::column_of(const Cell& cell, size_t entry) const {
  if (!has_six_bits) return cell.columns[entry];
  const size_t bit = entry * 6;
  return (cell.columns[bit / 8] | cell.columns[bit / 8 + 1] << 8) >> bit % 8 & 63;
}

template <class Visit>
void CellLayout::for_each_kept(size_t rows, Visit visit) const {
  const auto group = static_cast<size_t>(group_units), height = static_cast<size_t>(unit_rows);
  for (size_t index = 0; index < chunks * blocks; ++index) {
    const Cell of = cell(index / blocks, index % blocks);
    size_t entry = 0;
    for (size_t unit = 0; unit < of.group_count * group; ++unit) {
      if (unit && unit % group == 0) entry += of.counts[unit / group - 1] * group;
      const size_t row = index / blocks * chunk_rows + of.units[unit] * height;
      for (size_t e = entry + unit % group, end = entry + of.counts[unit / group] * group; e < end; e += group) {
        for (size_t r = 0; r < height && row + r < rows; ++r) {
          if (!is_zero(of.values, value_type, e * height + r)) visit(row + r, index % blocks * block_columns + column_of(of, e));
        }
      }
    }
  }
}

template <class Visit>
void BlockLayout::for_each_kept(size_t rows, Visit visit) const {
  for (size_t strip = 0; strip < strips; ++strip) {
    for (size_t block = first_block[strip]; block < first_block[strip + 1]; ++block) {
      for (size_t r = 0; r < kStripRows && strip * kStripRows + r < rows; ++r) {
        if (!is_zero(values.data(), value_type, block * kStripRows + r)) visit(strip * kStripRows + r, columns[block]);
      }
    }
  }
}

}  // namespace mfcompile
