// Y = X W^T + b for a packed W: chooses the kernel, makes its layout once, and cuts the work into tasks.
#pragma once

#include <memory>

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

// One weight in the layout of its kernels. Safe to run from several threads.
class SparseLinear {
 public:
  // Checks and converts the weight, which is not read again. Throws DamagedWeight.
  SparseLinear(const PackedWeight& weight, const Kernels& kernels, Activation activation = Activation::kNone);

  // y (tokens, rows) = activation(x (tokens, columns) W^T + bias (rows,) or null). As in a dense product, a NaN in a token
  // makes all of its outputs NaN, and an infinity those where it meets a pruned weight (0 * inf). The same bits for any number
  // of threads.
  void run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;

  int unit_rows() const { return unit_rows_; }
  size_t resident_bytes() const;

 private:
  enum class Way { kCells, kNarrowCells, kCellsByToken };
  Way choose_way(size_t tokens) const;
  void run_cells(const Kernels& kernels, const float* x, size_t tokens, const float* bias, float* y, const Parallel&) const;
  void run_cells_by_token(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void run_blocks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;
  void activate(float* y, size_t tokens, size_t rows) const;
  void mark_suspects(const float* x, size_t tokens, const float* suspects, float* y) const;
  void mark_token(const float* x, float* y) const;

  size_t rows_, columns_;
  const Kernels& kernels_;
  const Kernels& narrow_kernels_;  // for few tokens: shorter vectors
  Activation activation_;
  int unit_rows_;
  std::unique_ptr<const CellLayout> cells_;    // one of the two
  std::unique_ptr<const BlockLayout> blocks_;  // unit_rows_ == kStripRows
};

}  // namespace mfcompile
