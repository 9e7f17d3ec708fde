// Where the layouts of weights lie: large pieces of memory that many weights share, on huge pages where the system gives them.
// Weights that do not fit the caches are read half as fast again from huge pages (28 instead of 20 GB/s on Zen 4), and a weight
// alone rarely fills one.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <vector>

namespace mfcompile {

// `bytes` bytes, aligned to a cache line; freed with the last pointer into the same piece.
std::shared_ptr<void> allocate_weight_memory(size_t bytes);

// Gives back what lies behind the last bytes that were handed out: the first of them brought a whole huge page.
void release_unused_weight_memory();

// An array that is made once.
template <class T>
class WeightArray {
 public:
  WeightArray() = default;
  // Not set to anything.
  explicit WeightArray(size_t size) : memory_(allocate_weight_memory(size * sizeof(T))), size_(size) {}
  explicit WeightArray(const std::vector<T>& from) : WeightArray(from.size()) {
    if (size_) std::memcpy(write(), from.data(), bytes());
  }
  T* write() { return static_cast<T*>(memory_.get()); }
  const T* data() const { return static_cast<const T*>(memory_.get()); }
  const T& operator[](size_t index) const { return data()[index]; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  std::shared_ptr<void> memory_;
  size_t size_ = 0;
};

}  // namespace mfcompile
