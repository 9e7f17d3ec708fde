#include "file_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <memory>

namespace mfcompile {

namespace {

// Whether every byte belongs to one mapping of a file, private to this process.
bool is_mapped_from_file(uintptr_t begin, uintptr_t end) {
  const std::unique_ptr<FILE, int (*)(FILE*)> maps(std::fopen("/proc/self/maps", "r"), std::fclose);
  if (!maps) return false;
  char line[4096];
  while (std::fgets(line, sizeof line, maps.get())) {
    unsigned long long first = 0, last = 0, inode = 0;
    char permissions[8] = "";
    if (std::sscanf(line, "%llx-%llx %7s %*x %*s %llu", &first, &last, permissions, &inode) != 4) continue;
    if (first <= begin && begin < last) return end <= last && inode != 0 && permissions[3] == 'p';
  }
  return false;
}

}  // namespace

void release_file_pages(const void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + page - 1) / page * page;
  // onnxruntime never writes to constants, so the pages hold what the file holds, also of the tensors beside this one.
  if (begin < end && is_mapped_from_file(begin, end)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace mfcompile

#else

void mfcompile::release_file_pages(const void*, size_t) {}

#endif
