#include "packed.h"

namespace mfcompile {

namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;

std::string text(size_t number) { return std::to_string(number); }

std::string find_fault_of_sizes(const PackedWeight& weight) {
  if (weight.rows < 1 || weight.columns < 1 || weight.rows >= kLargestSide || weight.columns >= kLargestSide) {
    return "its shape is (" + std::to_string(weight.rows) + ", " + std::to_string(weight.columns) +
           "), and both sides must lie in 1 .. 2^31 - 1";
  }
  if (weight.entries < 1) return "it stores no value at all";
  if (weight.encoding == Encoding::kGap8 && weight.gap_bytes != weight.entries) {
    return "it has " + text(weight.gap_bytes) + " gaps and " + text(weight.entries) + " values, and needs as many of each";
  }
  if (weight.encoding == Encoding::kGap4 && (weight.entries % 2 || weight.gap_bytes != weight.entries / 2)) {
    return "it has " + text(weight.gap_bytes) + " bytes of 4-bit gaps and " + text(weight.entries) +
           " values, and needs two values for each byte";
  }
  return "";
}

}  // namespace

std::string find_fault(const PackedWeight& weight) {
  std::string fault = find_fault_of_sizes(weight);
  if (!fault.empty()) return fault;
  const uint64_t places = static_cast<uint64_t>(weight.rows) * static_cast<uint64_t>(weight.columns);
  uint64_t position = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    const uint8_t byte = weight.encoding == Encoding::kGap8 ? weight.gaps[entry] : weight.gaps[entry / 2];
    const unsigned gap = weight.encoding == Encoding::kGap8 ? byte : entry % 2 ? byte & 15u : byte >> 4u;
    if (gap == 0 && entry != 0) return "entry " + text(entry) + " has gap 0, so two entries name one place";
    position += gap;
    if (position >= places) {
      return "entry " + text(entry) + " lies at place " + text(position) + ", behind the last of " + text(places);
    }
  }
  return "";
}

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 1023u;
  float value;
  if (exponent == 0) {  // zero and denormals: fraction times 2^-24, exact in float
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace mfcompile
