#include "weight_memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
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

 private:
  void* mapping_;
  size_t reserved_;
  uintptr_t next_, end_;
};

#endif

}  // namespace

std::shared_ptr<void> allocate_weight_memory(size_t bytes) {
  bytes = round_up(bytes + 1, kLine);
#ifdef MFCOMPILE_HUGE_PAGES
  // Never destroyed: a session may outlive the static objects of this library. The piece itself lives by its weights.
  static std::mutex* const mutex = new std::mutex;
  static std::weak_ptr<Piece>* const current = new std::weak_ptr<Piece>;
  const std::lock_guard<std::mutex> lock(*mutex);
  std::shared_ptr<Piece> piece = current->lock();
  void* taken = piece ? piece->take(bytes) : nullptr;
  if (!taken) {
    piece = std::make_shared<Piece>(bytes > kPieceBytes ? round_up(bytes, kHugePage) : kPieceBytes);
    taken = piece->take(bytes);
    *current = piece;
  }
  return std::shared_ptr<void>(piece, taken);
#else
  void* taken = std::aligned_alloc(kLine, bytes);
  if (!taken) throw std::bad_alloc();
  return std::shared_ptr<void>(taken, std::free);
#endif
}

}  // namespace mfcompile
