// A weight as the file stores it: gap8 or gap4 (exporters/packing.py), checked once and then read in row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace mfcompile {

enum class Encoding { kGap8, kGap4 };
enum class ValueType { kFloat, kHalf };

// Borrowed views of the stored tensors of one (rows, columns) weight.
struct PackedWeight {
  Encoding encoding;
  ValueType value_type;
  const uint8_t* gaps;
  size_t gap_bytes;
  const void* values;
  size_t entries;
  int64_t rows;
  int64_t columns;
};

// Why this weight must be refused, or "" when every entry lies inside the weight and no place occurs twice.
std::string find_fault(const PackedWeight& weight);

float half_to_float(uint16_t half);

template <Encoding encoding, ValueType value_type, class Visit>
void for_each_entry_of(const PackedWeight& weight, Visit& visit) {
  const auto* values = static_cast<const char*>(weight.values);
  int64_t row = 0, column = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    if constexpr (encoding == Encoding::kGap8) {
      column += weight.gaps[entry];
    } else {
      column += entry % 2 ? weight.gaps[entry / 2] & 15 : weight.gaps[entry / 2] >> 4;
    }
    while (column >= weight.columns) {
      column -= weight.columns;
      ++row;
    }
    float value;
    if constexpr (value_type == ValueType::kFloat) {
      std::memcpy(&value, values + 4 * entry, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, values + 2 * entry, 2);
      value = half_to_float(half);
    }
    if (value != 0.0f) visit(row, column, value);  // NaN != 0, so a stored NaN is kept
  }
}

// Calls visit(row, column, value) for every stored value that is not zero, in row-major order.
// The weight must have passed find_fault.
template <class Visit>
void for_each_entry(const PackedWeight& weight, Visit visit) {
  if (weight.encoding == Encoding::kGap8) {
    if (weight.value_type == ValueType::kFloat) return for_each_entry_of<Encoding::kGap8, ValueType::kFloat>(weight, visit);
    return for_each_entry_of<Encoding::kGap8, ValueType::kHalf>(weight, visit);
  }
  if (weight.value_type == ValueType::kFloat) return for_each_entry_of<Encoding::kGap4, ValueType::kFloat>(weight, visit);
  return for_each_entry_of<Encoding::kGap4, ValueType::kHalf>(weight, visit);
}

// Calls visit(strip, values, kept) for every strip of Height rows that keeps anything, in order.
// values: (columns, Height), zero where pruned; kept: (columns,) bit r = row r of the strip keeps this column.
template <int Height, class Visit>
void for_each_strip(const PackedWeight& weight, Visit visit) {
  std::vector<float> values(static_cast<size_t>(weight.columns) * Height, 0.0f);
  std::vector<uint16_t> kept(static_cast<size_t>(weight.columns), 0);
  int64_t strip = 0, end = Height;  // rows of the strip lie before `end`
  bool is_empty = true;
  const auto flush = [&] {
    if (is_empty) return;
    visit(strip, values.data(), kept.data());
    std::memset(values.data(), 0, values.size() * sizeof(float));
    std::memset(kept.data(), 0, kept.size() * sizeof(uint16_t));
    is_empty = true;
  };
  for_each_entry(weight, [&](int64_t row, int64_t column, float value) {
    if (row >= end) {
      flush();
      strip = row / Height;
      end = (strip + 1) * Height;
    }
    const int64_t inside = row - (end - Height);
    values[static_cast<size_t>(column * Height + inside)] = value;
    kept[static_cast<size_t>(column)] |= static_cast<uint16_t>(1u << inside);
    is_empty = false;
  });
  flush();
}

}  // namespace mfcompile
