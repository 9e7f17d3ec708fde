// Packed weights as exporters/packing.py defines them, written again for the tests of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "half.h"
#include "packed.h"

namespace mfcompile {

// Tensors to the byte: a vector may own more than its size.
struct Stored {
  std::unique_ptr<uint8_t[]> index;
  size_t index_bytes;
  std::unique_ptr<char[]> values;
  size_t entries;
  PackedWeight view(Encoding encoding, ValueType type, int64_t rows, int64_t columns) const {
    return {encoding, type, index.get(), index_bytes, values.get(), entries, rows, columns};
  }
};

inline Stored store(const std::vector<uint8_t>& index, const std::vector<uint16_t>& values, ValueType type) {
  Stored stored{std::make_unique<uint8_t[]>(index.size()), index.size(),
                std::make_unique<char[]>(values.size() * bytes_of(type)), values.size()};
  std::copy(index.begin(), index.end(), stored.index.get());
  for (size_t entry = 0; entry < values.size(); ++entry) {
    const float value = half_to_float(values[entry]);
    std::memcpy(stored.values.get() + entry * bytes_of(type),
                type == ValueType::kFloat ? static_cast<const void*>(&value) : &values[entry], bytes_of(type));
  }
  return stored;
}

// The encodings as exporters/packing.py defines them, written again. Weights are halves.
inline Stored pack(const std::vector<uint16_t>& dense, Encoding encoding, ValueType type) {
  std::vector<uint8_t> gaps, mask((dense.size() + 7) / 8, 0);
  std::vector<uint16_t> values;
  if (encoding == Encoding::kMask) {
    for (size_t place = 0; place < dense.size(); ++place) {
      if (!dense[place]) continue;
      mask[place / 8] = static_cast<uint8_t>(mask[place / 8] | 1u << place % 8);
      values.push_back(dense[place]);
    }
    values.push_back(0);
    return store(mask, values, type);
  }
  const size_t limit = encoding == Encoding::kGap8 ? 255 : 15;
  size_t last = 0;
  for (size_t place = 0; place < dense.size(); ++place) {
    if (!dense[place]) continue;
    for (; place - last > limit; last += limit) gaps.push_back(static_cast<uint8_t>(limit)), values.push_back(0);
    gaps.push_back(static_cast<uint8_t>(place - last)), values.push_back(dense[place]);
    last = place;
  }
  if (gaps.empty()) gaps.push_back(0), values.push_back(0);
  if (encoding == Encoding::kGap8) return store(gaps, values, type);
  if (gaps.size() % 2 && last + 1 < dense.size()) gaps.push_back(1), values.push_back(0);
  if (gaps.size() % 2) gaps.pop_back(), values.pop_back();
  std::vector<uint8_t> halves;
  for (size_t index = 0; index < gaps.size(); index += 2)
    halves.push_back(static_cast<uint8_t>(gaps[index] << 4 | gaps[index + 1]));
  return store(halves, values, type);
}

// The dense weight by the plainest of loops, or nothing where the weight is damaged.
inline std::vector<float> decode_plainly(const PackedWeight& weight) {
  const auto places = static_cast<size_t>(weight.rows * weight.columns);
  std::vector<float> dense(places, 0.0f);
  const auto value = [&](size_t entry) {
    if (weight.value_type == ValueType::kHalf) {
      uint16_t half;
      std::memcpy(&half, static_cast<const char*>(weight.values) + entry * 2, 2);
      return half_to_float(half);
    }
    float found;
    std::memcpy(&found, static_cast<const char*>(weight.values) + entry * 4, 4);
    return found;
  };
  if (weight.encoding == Encoding::kMask) {
    if (weight.index_bytes != (places + 7) / 8 || weight.entries < 1) return {};
    size_t entry = 0;
    for (size_t place = 0; place < weight.index_bytes * 8; ++place) {
      if (!(weight.index[place / 8] >> place % 8 & 1)) continue;
      if (place >= places || entry + 1 >= weight.entries) return {};
      dense[place] = value(entry++);
    }
    if (entry + 1 != weight.entries || value(entry) != 0.0f) return {};
    return dense;
  }
  const bool is_gap8 = weight.encoding == Encoding::kGap8;
  if (weight.entries < 1 || weight.index_bytes * (is_gap8 ? 1 : 2) != weight.entries) return {};
  size_t place = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    const unsigned gap = is_gap8     ? weight.index[entry]
                         : entry % 2 ? weight.index[entry / 2] & 15u
                                     : weight.index[entry / 2] >> 4;
    place += gap;
    if ((entry && !gap) || place >= places) return {};
    dense[place] = value(entry);
  }
  return dense;
}

}  // namespace mfcompile
