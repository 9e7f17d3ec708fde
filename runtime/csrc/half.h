// IEEE half precision, for every instruction set: of internal linkage, because each file is compiled with its own flags.
#pragma once

#include <stdint.h>
#include <string.h>

namespace mfcompile {
namespace {

inline __attribute__((unused)) float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 1023u;
  float value;
  if (exponent == 0) {  // zero and denormals: fraction times 2^-24, exact in float
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace
}  // namespace mfcompile
