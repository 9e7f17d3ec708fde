// An int8 weight as the file stores it (exporters/quantization.py): gaps between kept blocks of 1 or 4 consecutive inputs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "packed.h"

namespace mfcompile {

// Borrowed views of the stored tensors of one (rows, columns) weight. A place is a block; there are columns / block in a row.
struct PackedInt8 {
  Encoding encoding;
  const uint8_t* gaps;
  size_t gap_bytes;
  const int8_t* values;  // (entries, block)
  size_t entries;
  int block;  // 1 or 4
  int64_t rows;
  int64_t columns;
};

// Why this weight must be refused, or "" when every entry lies inside the weight and no place occurs twice.
std::string find_fault(const PackedInt8& weight);

// Four consecutive inputs of an output are a group: the weights that one multiply-add of 8-bit numbers takes.
constexpr int kGroup = 4;

inline size_t group_count(const PackedInt8& weight) { return (static_cast<size_t>(weight.columns) + kGroup - 1) / kGroup; }

inline unsigned gap_of(const PackedInt8& weight, size_t entry) {
  if (weight.encoding == Encoding::kGap8) return weight.gaps[entry];
  return entry % 2 ? weight.gaps[entry / 2] & 15u : weight.gaps[entry / 2] >> 4u;
}

// Calls visit(row, group, word) for every group that keeps anything, in row-major order; word holds its four weights, the
// first in the lowest byte, zero where pruned or behind the last column. The weight must have passed find_fault.
template <class Visit>
void for_each_group(const PackedInt8& weight, Visit visit) {
  const int64_t width = weight.columns / weight.block;
  int64_t row = 0, place = 0, last_row = 0, last_group = 0;
  uint32_t word = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    place += gap_of(weight, entry);
    while (place >= width) {
      place -= width;
      ++row;
    }
    // The bytes may lie in a file, and have changed since they were checked.
    if (row >= weight.rows) throw std::runtime_error("a packed weight changed after it was loaded");
    const int64_t group = weight.block == kGroup ? place : place / kGroup;
    if (row != last_row || group != last_group) {
      if (word) visit(last_row, last_group, word);
      word = 0, last_row = row, last_group = group;
    }
    if (weight.block == kGroup) {
      for (int byte = 0; byte < kGroup; ++byte) {
        const auto bits = static_cast<uint8_t>(weight.values[entry * kGroup + static_cast<size_t>(byte)]);
        word |= static_cast<uint32_t>(bits) << 8 * byte;
      }
    } else {
      word |= static_cast<uint32_t>(static_cast<uint8_t>(weight.values[entry])) << 8 * (place % kGroup);
    }
  }
  if (word) visit(last_row, last_group, word);
}

}  // namespace mfcompile
