// Y = X W^T + b for a packed W: chooses the kernel, makes its layout once, and cuts the work into tasks.
#pragma once

#include <memory>
#include <mutex>

#include "kernels.h"
#include "layouts.h"
#include "packed.h"

namespace mfcompile {

// Runs task(argument, 0 .. count - 1), in any order and on any threads, and returns when all are done.
class Parallel {
 public:
  virtual void run(void (*task)(void*, size_t), size_t count, void* argument) const = 0;

 protected:
  ~Parallel() = default;
};

// Kernels of the best instruction set that this machine has; `cap` ("portable", "avx2", "avx512") forbids better ones.
// Null when the name is not known or this machine does not have it.
const Kernels* choose_kernels(const char* cap);

// One weight and the layouts made of it. Safe to run from several threads.
class SparseLinear {
 public:
  // The weight must have passed find_fault, and what it points to must outlive this.
  SparseLinear(const PackedWeight& weight, const Kernels& kernels);

  // y (tokens, rows) = x (tokens, columns) W^T + bias (rows,) or null. As in a dense product, a NaN in a token makes all
  // of its outputs NaN, and an infinity those where it meets a pruned weight (0 * inf).
  void run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;

  int unit_rows() const { return structure_.unit_rows; }
  size_t resident_bytes() const;

 private:
  void check_again() const;
  enum class Way { kCells, kCellsByToken, kMasks };
  Way choose_way(size_t tokens) const;
  void run_cells(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void run_cells_by_token(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void run_masks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void run_blocks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void mark_suspects(const float* x, size_t tokens, const float* suspects, float* y) const;
  void mark_token(const float* x, float* y) const;
  template <class Layout>
  struct LayoutOnce {
    std::once_flag once;
    std::unique_ptr<const Layout> layout;
    size_t bytes() const { return layout ? layout->bytes() : 0; }
  };
  template <class Layout, class... Arguments>
  const Layout& make_once(LayoutOnce<Layout>& held, Arguments... arguments) const;
  const CellLayout& cells() const;
  const MaskLayout& masks() const;
  const BlockLayout& blocks() const;

  PackedWeight weight_;
  const Kernels& kernels_;
  Structure structure_;
  mutable LayoutOnce<CellLayout> cells_;
  mutable LayoutOnce<MaskLayout> masks_;
  mutable LayoutOnce<BlockLayout> blocks_;
};

}  // namespace mfcompile
