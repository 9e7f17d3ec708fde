// Memory of a packed weight that is no longer needed.
#pragma once

#include <cstddef>

namespace mfcompile {

// Gives back the pages of these bytes, where they are mapped from a file (external data of a model) and can be read from it
// again, as can what lies beside them; does nothing elsewhere. The bytes stay readable.
void release_file_pages(const void* data, size_t bytes);

}  // namespace mfcompile
