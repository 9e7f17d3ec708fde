// A weight as the file stores it (exporters/packing.py): checked and decoded in one pass, so that nothing is ever read through
// an index that was not checked, even where the bytes lie in a file that another process may change.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace mfcompile {

// kGap8, kGap4: distances between stored values, one or two in a byte. kMask: one bit for each weight, lowest bit first, and
// one value more than bits are set, a zero.
enum class Encoding { kGap8, kGap4, kMask };
enum class ValueType { kFloat, kHalf };

inline size_t bytes_of(ValueType type) { return type == ValueType::kFloat ? 4 : 2; }

// Whether a value is zero, of either sign.
inline bool is_zero(const void* values, ValueType type, size_t index) {
  if (type == ValueType::kFloat) {
    float value;
    std::memcpy(&value, static_cast<const char*>(values) + index * 4, 4);
    return value == 0.0f;
  }
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(values) + index * 2, 2);
  return (half & 0x7fffu) == 0;
}

// Borrowed views of the stored tensors of one (rows, columns) weight.
struct PackedWeight {
  Encoding encoding;
  ValueType value_type;
  const uint8_t* index;  // gaps or mask
  size_t index_bytes;
  const void* values;
  size_t entries;
  int64_t rows;
  int64_t columns;
};

// What is wrong with a packed weight.
class DamagedWeight : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where the values of a weight lie. Units are rows, or strips of rows that share columns; columns are cut into blocks. Block b
// of unit u has the entries starts[u * blocks + b] .. starts[u * blocks + b + 1], in order of their columns.
struct Entries {
  size_t units;
  size_t blocks;
  size_t block_columns;
  std::vector<uint32_t> starts;
  std::vector<uint8_t> columns;  // inside the block
};

// The entries of every row; entry e has value e of the weight, which may be a stored zero. block_columns is at most 256.
// Throws DamagedWeight when an entry lies outside the weight, two share a place, or sizes do not fit.
Entries decode(const PackedWeight& weight, size_t block_columns);

// Why this weight must be refused, or "".
std::string find_fault(const PackedWeight& weight);

}  // namespace mfcompile
