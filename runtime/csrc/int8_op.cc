// mfcompile::SparseLinearInt8 and mfcompile::SparseLinearInt8Gap4 as custom operators of onnxruntime.
//
// Inputs: X (..., K) float32; gaps (bytes,) uint8, values (entries, block) int8 and scales (N,) float32, constant; bias (N,)
// float32, constant or not. Attribute shape = [N, K]. Output: (..., N) float32, what DynamicQuantizeLinear, MatMulInteger,
// the scales and the bias give.
#include "int8_op.h"

#include <string>
#include <vector>

#include "int8_linear.h"
#include "ort_support.h"

namespace mfcompile {
namespace {

class Int8Kernel {
 public:
  Int8Kernel(const KernelInfo* info, Encoding encoding) : name_("SparseLinearInt8 node '" + name_of(info) + "'") {
    int64_t shape[2] = {};
    size_t rank = 2;
    Status* status = g_api.get_attribute_ints.call(info, "shape", shape, &rank);
    if (status || rank != 2) {
      if (status) g_api.release_status.call(status);
      refuse("needs an attribute shape = [N, K]");
    }
    const Tensor gaps = read_constant(name_, info, 1, "gaps"), values = read_constant(name_, info, 2, "values");
    const Tensor scales = read_constant(name_, info, 3, "scales");
    if (gaps.type != kUint8 || gaps.shape.size() != 1) refuse("needs gaps of type uint8 and rank 1");
    if (values.type != kInt8 || values.shape.size() != 2) refuse("needs values of type int8 and rank 2");
    if (scales.type != kFloat || scales.shape != std::vector<int64_t>{shape[0]}) {
      refuse("has " + std::to_string(shape[0]) + " outputs and was given scales of shape " + text_of(scales.shape));
    }
    const PackedInt8 weight{encoding,
                            static_cast<const uint8_t*>(gaps.data),
                            gaps.count,
                            static_cast<const int8_t*>(values.data),
                            static_cast<size_t>(values.shape[0]),
                            static_cast<int>(values.shape[1] == 4 ? 4 : values.shape[1] == 1 ? 1 : 0),
                            shape[0],
                            shape[1]};
    const std::string fault = find_fault(weight);
    if (!fault.empty()) refuse("has a packed weight that is damaged: " + fault + ". Export the model again");
    const char* cap = std::getenv(kCapVariable);
    const Int8Kernels* kernels = choose_int8_kernels(cap);
    if (!kernels) {
      refuse(std::string("cannot use the instruction set that ") + kCapVariable + "=" + cap +
             " names: it is not one of portable, avx2, avx512, or this machine does not have it. Unset the variable");
    }
    rows_ = shape[0];
    columns_ = shape[1];
    linear_ = std::make_unique<SparseLinearInt8>(weight, static_cast<const float*>(scales.data), *kernels);
  }

  void compute(KernelContext* context) const {
    const Tensor x = read_input(context, 0), bias = read_input(context, 4);
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != columns_) {
      refuse("multiplies by a weight of shape (" + std::to_string(rows_) + ", " + std::to_string(columns_) +
             ") and was given X of shape " + text_of(x.shape));
    }
    if (bias.shape != std::vector<int64_t>{rows_}) {
      refuse("has " + std::to_string(rows_) + " outputs and was given a bias of shape " + text_of(bias.shape));
    }
    std::vector<int64_t> shape = x.shape;
    shape.back() = rows_;
    Value* output = nullptr;
    check(g_api.get_output.call(context, 0, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(g_api.get_tensor_data.call(output, &y));
    linear_->run(static_cast<const float*>(x.data), x.count / static_cast<size_t>(columns_),
                 static_cast<const float*>(bias.data), static_cast<float*>(y), OrtParallel(context));
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const { throw Refusal{kInvalidArgument, name_ + " " + reason}; }

  static Tensor read_input(KernelContext* context, size_t index) {
    const Value* value = nullptr;
    check(g_api.get_input.call(context, index, &value));
    return read_tensor(value);
  }

  std::string name_;
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::unique_ptr<SparseLinearInt8> linear_;
};

template <Encoding encoding>
CustomOp make_operator(const char* (*get_name)(const CustomOp*)) {
  CustomOp op{};
  set_common_fields<Int8Kernel>(op);
  op.get_name = get_name;
  op.get_input_type = [](const CustomOp*, size_t index) { return index == 1 ? kUint8 : index == 2 ? kInt8 : kFloat; };
  op.get_input_count = [](const CustomOp*) -> size_t { return 5; };
  op.get_input_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.create_kernel_status = [](const CustomOp*, const void*, const KernelInfo* info, void** kernel) -> Status* {
    return guard([&] { *kernel = new Int8Kernel(info, encoding); });
  };
  return op;
}

}  // namespace

void add_int8_operators(Domain* domain) {
  static const CustomOp gap8 = make_operator<Encoding::kGap8>([](const CustomOp*) { return "SparseLinearInt8"; });
  static const CustomOp gap4 = make_operator<Encoding::kGap4>([](const CustomOp*) { return "SparseLinearInt8Gap4"; });
  check(g_api.add_op.call(domain, &gap8));
  check(g_api.add_op.call(domain, &gap4));
}

}  // namespace mfcompile
