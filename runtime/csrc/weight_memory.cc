#include "weight_memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#define MFCOMPILE_HUGE_PAGES 1
#endif

namespace mfcompile {

namespace {

constexpr size_t kLine = 64;

size_t round_up(size_t number, size_t to) { return (number + to - 1) / to * to; }

#ifdef MFCOMPILE_HUGE_PAGES

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPieceBytes = size_t{64} << 20;  // of addresses; memory is taken as it is written

class Piece {
 public:
  explicit Piece(size_t bytes) : reserved_(bytes + kHugePage) {
    mapping_ = mmap(nullptr, reserved_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    next_ = round_up(reinterpret_cast<uintptr_t>(mapping_), kHugePage);
    end_ = next_ + bytes;
    madvise(reinterpret_cast<void*>(next_), bytes, MADV_HUGEPAGE);  // a wish: where it is refused, pages are small
  }
  ~Piece() { munmap(mapping_, reserved_); }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;

  // The next bytes of this piece, or null where they do not fit.
  void* take(size_t bytes) {
    if (end_ - next_ < bytes) return nullptr;
    void* taken = reinterpret_cast<void*>(next_);
    next_ += bytes;
    return taken;
  }

  // Small pages from here to the end of the huge page, so that the system does not make it whole again.
  void release_unused() {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = round_up(next_, page), end = std::min(end_, round_up(next_, kHugePage));
    if (begin == end) return;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_NOHUGEPAGE);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }

 private:
  void* mapping_;
  size_t reserved_;
  uintptr_t next_, end_;
};

// Never destroyed: a session may outlive the static objects of this library. The piece itself lives by its weights.
std::mutex& mutex_of_pieces() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}

std::weak_ptr<Piece>& current_piece() {
  static std::weak_ptr<Piece>* const current = new std::weak_ptr<Piece>;
  return *current;
}

#endif

}  // namespace

void release_unused_weight_memory() {
#ifdef MFCOMPILE_HUGE_PAGES
  const std::lock_guard<std::mutex> lock(mutex_of_pieces());
  if (const std::shared_ptr<Piece> piece = current_piece().lock()) piece->release_unused();
#endif
}

std::shared_ptr<void> allocate_weight_memory(size_t bytes) {
  bytes = round_up(bytes + 1, kLine);
#ifdef MFCOMPILE_HUGE_PAGES
  const std::lock_guard<std::mutex> lock(mutex_of_pieces());
  std::shared_ptr<Piece> piece = current_piece().lock();
  void* taken = piece ? piece->take(bytes) : nullptr;
  if (!taken) {
    if (piece) piece->release_unused();
    piece = std::make_shared<Piece>(bytes > kPieceBytes ? round_up(bytes, kHugePage) : kPieceBytes);
    taken = piece->take(bytes);
    current_piece() = piece;
  }
  return std::shared_ptr<void>(piece, taken);
#else
  void* taken = std::aligned_alloc(kLine, bytes);
  if (!taken) throw std::bad_alloc();
  return std::shared_ptr<void>(taken, std::free);
#endif
}

}  // namespace mfcompile
