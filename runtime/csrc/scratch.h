// Work memory that is kept between calls: fresh memory costs a page fault for every 4 KiB.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace mfcompile {

// A buffer of floats, aligned to a cache line, borrowed from a list shared by all weights until it goes out of scope.
class Scratch {
 public:
  explicit Scratch(size_t floats) {
    const size_t bytes = (floats * sizeof(float) + 127) / 64 * 64;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      std::vector<Block>& free_blocks = list();
      for (size_t index = free_blocks.size(); index-- > 0;) {
        if (free_blocks[index].bytes >= bytes) {
          block_ = free_blocks[index];
          free_blocks.erase(free_blocks.begin() + static_cast<std::ptrdiff_t>(index));
          return;
        }
      }
      if (!free_blocks.empty()) {  // too small: replaced, so that the list holds no more blocks than were ever in use at once
        std::free(free_blocks.back().data);
        free_blocks.pop_back();
      }
    }
    block_ = {static_cast<float*>(std::aligned_alloc(64, bytes)), bytes};
    if (!block_.data) throw std::bad_alloc();
  }
  ~Scratch() {
    const std::lock_guard<std::mutex> lock(mutex());
    list().push_back(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return block_.data; }

  static void release_all() {
    const std::lock_guard<std::mutex> lock(mutex());
    for (const Block& block : list()) std::free(block.data);
    list().clear();
  }

 private:
  struct Block {
    float* data;
    size_t bytes;
  };
  // Never destroyed: a session may outlive the static objects of this library.
  static std::mutex& mutex() {
    static std::mutex* const held = new std::mutex;
    return *held;
  }
  static std::vector<Block>& list() {
    static std::vector<Block>* const held = new std::vector<Block>;
    return *held;
  }
  Block block_;
};

}  // namespace mfcompile
