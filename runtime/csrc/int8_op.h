// The int8 operators of this library.
#pragma once

#include "abi.h"

namespace mfcompile {

// Adds mfcompile::SparseLinearInt8 and SparseLinearInt8Gap4 to the domain.
void add_int8_operators(abi::Domain* domain);

}  // namespace mfcompile
