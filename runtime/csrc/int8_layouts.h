// The layouts that int8 kernels read, made from a packed weight when they are first needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "int8_kernels.h"
#include "int8_packed.h"
#include "weight_memory.h"

namespace mfcompile {

// Many tokens: as CellLayout (layouts.h), of single rows and of groups of four inputs. Five bytes for each kept group, and two
// for each row of a cell.
struct Int8CellLayout {
  static constexpr size_t kBlockGroups = 96;
  size_t chunk_rows = 0;
  size_t chunks = 0;
  size_t blocks = 0;
  WeightArray<size_t> first_run, first_row, first_entry;  // of every cell (chunk, block), and one behind the last
  WeightArray<Run> runs;
  WeightArray<uint16_t> rows;
  WeightArray<uint8_t> groups;
  WeightArray<int32_t> words;

  explicit Int8CellLayout(const PackedInt8& weight);
  Int8Cell cell(size_t chunk, size_t block) const;
  size_t bytes() const;
};

// Few tokens, and weights that keep most groups: 16 rows share a mask for each group. Four bytes for each kept group and one
// bit for each group.
struct Int8MaskLayout {
  size_t strips = 0;
  WeightArray<uint16_t> masks;     // (strips, groups)
  WeightArray<size_t> first_word;  // of every strip
  WeightArray<int32_t> words;      // in order of strip, group, row; 16 more than needed

  explicit Int8MaskLayout(const PackedInt8& weight);
  size_t bytes() const { return masks.bytes() + first_word.bytes() + words.bytes(); }
};

}  // namespace mfcompile
