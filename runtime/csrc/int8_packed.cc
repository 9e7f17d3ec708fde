#include "int8_packed.h"

namespace mfcompile {

namespace {

constexpr int64_t kLargestSide = int64_t{1} << 31;

std::string text(uint64_t number) { return std::to_string(number); }

std::string find_fault_of_sizes(const PackedInt8& weight) {
  if (weight.rows < 1 || weight.columns < 1 || weight.rows >= kLargestSide || weight.columns >= kLargestSide) {
    return "its shape is (" + std::to_string(weight.rows) + ", " + std::to_string(weight.columns) +
           "), and both sides must lie in 1 .. 2^31 - 1";
  }
  if (weight.block != 1 && weight.block != kGroup) return "its blocks must hold 1 or 4 weights";
  if (weight.columns % weight.block) {
    return "its " + std::to_string(weight.columns) + " inputs are no whole number of blocks of " + std::to_string(weight.block);
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

std::string find_fault(const PackedInt8& weight) {
  std::string fault = find_fault_of_sizes(weight);
  if (!fault.empty()) return fault;
  const uint64_t places = static_cast<uint64_t>(weight.rows) * static_cast<uint64_t>(weight.columns / weight.block);
  uint64_t position = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    const unsigned gap = gap_of(weight, entry);
    if (gap == 0 && entry != 0) return "entry " + text(entry) + " has gap 0, so two entries name one place";
    position += gap;
    if (position >= places) {
      return "entry " + text(entry) + " lies at place " + text(position) + ", behind the last of " + text(places);
    }
  }
  return "";
}

}  // namespace mfcompile
