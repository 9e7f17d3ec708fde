// Y = X W^T + bias with an int8 weight and activations that are quantized as they come.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "int8_kernels.h"
#include "int8_layouts.h"
#include "int8_packed.h"
#include "sparse_linear.h"

namespace mfcompile {

// Kernels of an instruction set ("portable", "avx2", "avx512"), the best of this machine where `cap` is null or empty; null
// where this machine does not have it. Below the cap the best is taken: "avx512" without VNNI gives the kernels of AVX2.
const Int8Kernels* choose_int8_kernels(const char* cap);

// What DynamicQuantizeLinear of ONNX chooses for values of this range, which holds zero.
Quantization choose_quantization(float low, float high);

// y = float(sum over k of (xq - zero) wq) * (x_scale * scale[row]) + bias[row], all sums exact modulo 2^32; every operation in
// float32, rounded one after the other, as the operators of ONNX do. NaN everywhere where x holds a NaN or an infinity: one
// scale serves the whole of x.
class SparseLinearInt8 {
 public:
  // The views must outlive this; they must have passed find_fault. scales: (rows,).
  SparseLinearInt8(const PackedInt8& weight, const float* scales, const Int8Kernels& kernels);

  // x (tokens, columns), bias (rows,) or null, y (tokens, rows). May run in several threads at once.
  void run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const;

  size_t resident_bytes() const;

 private:
  struct Input;  // quantized activations
  void run_cells(const Input& input, const float* bias, float* y, const Parallel& parallel) const;
  void run_masks(const Input& input, const float* bias, float* y, const Parallel& parallel) const;
  bool prefers_masks(size_t tokens) const;
  template <class Layout>
  const Layout& make_once(std::once_flag& once, std::unique_ptr<const Layout>& layout) const;

  PackedInt8 weight_;
  const Int8Kernels& kernels_;
  size_t kept_groups_ = 0;
  std::vector<float> scales_;
  std::vector<uint32_t> row_sums_;
  mutable std::once_flag cells_once_, masks_once_;
  mutable std::unique_ptr<const Int8CellLayout> cells_;
  mutable std::unique_ptr<const Int8MaskLayout> masks_;
};

}  // namespace mfcompile
