#include "int8_packed.h"

namespace mfcompile {

std::string find_fault(const PackedInt8& weight) {
  if (weight.block != 1 && weight.block != kGroup) {
    return "its blocks hold " + std::to_string(weight.block) + " weights, and must hold 1 or 4";
  }
  if (weight.columns % weight.block) {
    return "its " + std::to_string(weight.columns) + " inputs are no whole number of blocks of " + std::to_string(weight.block);
  }
  // The places are blocks; values are only counted.
  return find_fault(PackedWeight{weight.encoding, ValueType::kFloat, weight.gaps, weight.gap_bytes, weight.values,
                                 weight.entries, weight.rows, weight.columns / weight.block});
}

}  // namespace mfcompile
