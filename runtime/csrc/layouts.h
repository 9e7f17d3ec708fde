// The layouts that kernels read, made from a packed weight when they are first needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "packed.h"
#include "weight_memory.h"

namespace mfcompile {

// Many tokens. Rows are cut into chunks (the rows of one task), columns into blocks (what stays in the L1 cache); in each
// cell the units (rows, or strips of 4 rows that share columns) are sorted by how much they keep, so that two units run
// side by side and trip counts repeat. Five bytes for each kept weight, and two for each unit of a cell.
struct CellLayout {
  int unit_rows = 1;
  int block_columns = 0;
  size_t chunk_rows = 0;
  size_t chunks = 0;
  size_t blocks = 0;
  WeightArray<size_t> first_run, first_unit, first_entry;  // of every cell (chunk, block), and one behind the last
  WeightArray<Run> runs;
  WeightArray<uint16_t> units;
  WeightArray<uint8_t> columns;
  WeightArray<float> values;

  CellLayout(const PackedWeight& weight, int unit_rows, int block_columns);
  Cell cell(size_t chunk, size_t block) const;
  size_t bytes() const;
};

// Few tokens: 16 rows share a mask for each column. Four bytes for each kept weight and one bit for each weight.
struct MaskLayout {
  size_t strips = 0;
  WeightArray<uint16_t> masks;      // (strips, columns)
  WeightArray<size_t> first_value;  // of every strip
  WeightArray<float> values;        // in order of strip, column, row; 16 more than needed

  explicit MaskLayout(const PackedWeight& weight);
  size_t bytes() const { return masks.bytes() + first_value.bytes() + values.bytes(); }
};

// The pattern 16x1: the columns that a strip of 16 rows keeps, with 16 values each.
struct BlockLayout {
  size_t strips = 0;
  WeightArray<size_t> first_block;  // of every strip, and one behind the last
  WeightArray<uint32_t> columns;
  WeightArray<float> values;  // (blocks, 16)

  explicit BlockLayout(const PackedWeight& weight);
  size_t bytes() const { return first_block.bytes() + columns.bytes() + values.bytes(); }
};

// unit_rows: how many rows share their columns, found in the weight itself: 16, 4 or 1. A block counts as kept when any of
// its weights is; the largest height is taken at which at most a twentieth of the values in kept blocks are zeros.
struct Structure {
  int unit_rows;
  size_t kept_count;
};
Structure find_structure(const PackedWeight& weight);

}  // namespace mfcompile
