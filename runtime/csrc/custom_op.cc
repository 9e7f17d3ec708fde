// mfcompile::SparseLinear, mfcompile::SparseLinearGap4 and mfcompile::SparseLinearMask as custom operators of onnxruntime.
//
// Inputs: X (..., K) float32; gaps or mask (bytes,) uint8 and values (entries,) float32 or float16, both constant; bias (N,)
// float32, optional. Attribute shape = [N, K]. Output: (..., N) float32 = X W^T + bias. The operators named NoBias are the same
// kernels: a function that stands in for an operator cannot have an optional input, so files name those without a bias
// differently.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "file_pages.h"
#include "int8_op.h"
#include "ort_support.h"
#include "weight_memory.h"

namespace mfcompile {
namespace {

class Kernel {
 public:
  Kernel(const KernelInfo* info, Encoding encoding, Activation activation)
      : name_("SparseLinear node '" + name_of(info) + "'") {
    int64_t shape[2] = {};
    size_t rank = 2;
    Status* status = g_api.get_attribute_ints.call(info, "shape", shape, &rank);
    if (status || rank != 2) {
      if (status) g_api.release_status.call(status);
      refuse("needs an attribute shape = [N, K]");
    }
    const char* what = encoding == Encoding::kMask ? "mask" : "gaps";
    const Tensor index = read_constant(name_, info, 1, what), values = read_constant(name_, info, 2, "values");
    if (index.type != kUint8 || index.shape.size() != 1) refuse(std::string("needs ") + what + " of type uint8 and rank 1");
    if ((values.type != kFloat && values.type != kFloat16) || values.shape.size() != 1) {
      refuse("needs values of type float32 or float16 and rank 1");
    }
    const PackedWeight weight{encoding,
                              values.type == kFloat ? ValueType::kFloat : ValueType::kHalf,
                              static_cast<const uint8_t*>(index.data),
                              index.count,
                              values.data,
                              values.count,
                              shape[0],
                              shape[1]};
    const char* cap = std::getenv(kCapVariable);
    const Kernels* kernels = choose_kernels(cap);
    if (!kernels) {
      refuse(std::string("cannot use the instruction set that ") + kCapVariable + "=" + cap +
             " names: it is not one of portable, avx2, avx512, or this machine does not have it. Unset the variable");
    }
    rows_ = shape[0];
    columns_ = shape[1];
    try {
      linear_ = std::make_unique<SparseLinear>(weight, *kernels, activation);
    } catch (const DamagedWeight& damage) {
      refuse(std::string("has a packed weight that is damaged: ") + damage.what() + ". Export the model again");
    }
    release_file_pages(weight.index, weight.index_bytes);
    release_file_pages(weight.values, weight.entries * bytes_of(weight.value_type));
    find_constant_bias(info);
  }

  void compute(KernelContext* context) const {
    const Value* value = nullptr;
    check(g_api.get_input.call(context, 0, &value));
    const Tensor x = read_tensor(value);
    if (x.type != kFloat || x.shape.empty() || x.shape.back() != columns_) {
      refuse("multiplies by a weight of shape (" + std::to_string(rows_) + ", " + std::to_string(columns_) +
             ") and was given X of shape " + text_of(x.shape));
    }
    const float* bias = constant_bias_ ? constant_bias_ : read_bias(context);
    std::vector<int64_t> shape = x.shape;
    shape.back() = rows_;
    Value* output = nullptr;
    check(g_api.get_output.call(context, 0, shape.data(), shape.size(), &output));
    void* y = nullptr;
    check(g_api.get_tensor_data.call(output, &y));
    linear_->run(static_cast<const float*>(x.data), x.count / static_cast<size_t>(columns_), bias, static_cast<float*>(y),
                 OrtParallel(context));
  }

 private:
  [[noreturn]] void refuse(const std::string& reason) const { throw Refusal{kInvalidArgument, name_ + " " + reason}; }

  const float* as_bias(const Value* value) const {
    const Tensor tensor = read_tensor(value);
    if (tensor.type != kFloat || tensor.shape != std::vector<int64_t>{rows_}) {
      refuse("has " + std::to_string(rows_) + " outputs and was given a bias of shape " + text_of(tensor.shape));
    }
    return static_cast<const float*>(tensor.data);
  }

  // Asking onnxruntime for a bias takes about as long as adding it.
  void find_constant_bias(const KernelInfo* info) {
    int is_constant = 0;
    const Value* value = nullptr;
    Status* status = g_api.get_constant_input.call(info, 3, &is_constant, &value);
    if (status) return g_api.release_status.call(status);
    if (is_constant && value) constant_bias_ = as_bias(value);
  }

  const float* read_bias(KernelContext* context) const {
    size_t input_count = 0;
    check(g_api.get_input_count.call(context, &input_count));
    if (input_count <= 3) return nullptr;
    const Value* value = nullptr;
    check(g_api.get_input.call(context, 3, &value));
    return value ? as_bias(value) : nullptr;
  }

  std::string name_;
  const float* constant_bias_ = nullptr;
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::unique_ptr<SparseLinear> linear_;
};

struct Operator : CustomOp {
  std::string name;
  Encoding encoding;
  Activation activation;
};

const Operator& as_operator(const CustomOp* op) { return *static_cast<const Operator*>(op); }

Operator make_operator(const std::string& name, Encoding encoding, Activation activation) {
  Operator op{};
  op.name = name;
  op.encoding = encoding;
  op.activation = activation;
  set_common_fields<Kernel>(op);
  op.get_name = [](const CustomOp* self) { return as_operator(self).name.c_str(); };
  op.get_input_type = [](const CustomOp*, size_t index) { return index == 1 ? kUint8 : index == 2 ? kUndefined : kFloat; };
  op.get_input_count = [](const CustomOp*) -> size_t { return 4; };
  op.get_input_characteristic = [](const CustomOp*, size_t index) { return index == 3 ? kOptional : kRequired; };
  op.create_kernel_status = [](const CustomOp* self, const void*, const KernelInfo* info, void** kernel) -> Status* {
    return guard([&] { *kernel = new Kernel(info, as_operator(self).encoding, as_operator(self).activation); });
  };
  return op;
}

// Tries every function that needs no session. "" when all do what their position promises.
std::string test_api() {
  Status* status = g_api.create_status.call(kNotImplemented, "mfcompile self-test");
  if (!status) return "CreateStatus gave nothing";
  const bool is_read_back = g_api.get_error_code.call(status) == kNotImplemented &&
                            std::string("mfcompile self-test") == g_api.get_error_message.call(status);
  g_api.release_status.call(status);
  if (!is_read_back) return "a status is not read back as it was made";
  TypeAndShape* info = nullptr;
  const int64_t dimensions[3] = {2, 3, 5};
  if (g_api.create_shape.call(&info) || !info) return "CreateTensorTypeAndShapeInfo failed";
  ElementType type = kUndefined;
  size_t rank = 0, count = 0;
  int64_t found[3] = {};
  const bool is_right = !g_api.set_element_type.call(info, kUint8) && !g_api.set_dimensions.call(info, dimensions, 3) &&
                        !g_api.get_element_type.call(info, &type) && !g_api.get_rank.call(info, &rank) && rank == 3 &&
                        !g_api.get_dimensions.call(info, found, 3) && !g_api.get_element_count.call(info, &count) &&
                        type == kUint8 && count == 30 && found[0] == 2 && found[1] == 3 && found[2] == 5;
  g_api.release_shape.call(info);
  return is_right ? "" : "a tensor shape is not read back as it was made";
}

const void* const* find_table(const ApiBase* base) {
  const void* const* table = base->get_api(kApiVersion);
  return table ? table : base->get_api(1);  // an onnxruntime that is too old still makes a status to say so
}

// Every encoding with every activation, with a bias and without.
std::vector<Operator> make_operators() {
  const std::pair<const char*, Encoding> encodings[] = {
      {"SparseLinear", Encoding::kGap8}, {"SparseLinearGap4", Encoding::kGap4}, {"SparseLinearMask", Encoding::kMask}};
  const std::pair<const char*, Activation> activations[] = {{"", Activation::kNone},
                                                            {"Relu", Activation::kRelu},
                                                            {"Gelu", Activation::kGelu},
                                                            {"GeluTanh", Activation::kGeluTanh},
                                                            {"QuickGelu", Activation::kQuickGelu},
                                                            {"Silu", Activation::kSilu}};
  std::vector<Operator> operators;
  for (const auto& [base, encoding] : encodings) {
    for (const auto& [suffix, activation] : activations) {
      for (const char* ending : {"", "NoBias"}) {
        operators.push_back(make_operator(std::string(base) + suffix + ending, encoding, activation));
      }
    }
  }
  return operators;
}

Domain* make_domain() {
  static const std::vector<Operator> operators = make_operators();
  Domain* domain = nullptr;
  check(g_api.create_domain.call("mfcompile", &domain));
  for (const Operator& op : operators) check(g_api.add_op.call(domain, &op));
  add_int8_operators(domain);
  return domain;
}

}  // namespace
}  // namespace mfcompile

#define MFCOMPILE_EXPORT extern "C" __attribute__((visibility("default")))

// What onnxruntime calls for session_options.register_custom_ops_library(path).
MFCOMPILE_EXPORT mfcompile::abi::Status* RegisterCustomOps(mfcompile::abi::SessionOptions* options,
                                                           const mfcompile::abi::ApiBase* base) {
  using namespace mfcompile;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const void* const* table = find_table(base);
  if (!table) {
    std::fprintf(stderr, "mfcompile.runtime: onnxruntime %s gives out no C API; sparse kernels are not used\n",
                 base->get_version());
    return nullptr;
  }
  g_api.create_status.load(table);
  if (!base->get_api(kApiVersion)) {
    const std::string message =
        std::string("mfcompile.runtime needs onnxruntime 1.20 or later, this is ") + base->get_version();
    return g_api.create_status.call(kNotImplemented, message.c_str());
  }
  g_api.load(table);
  const std::string fault = test_api();
  if (!fault.empty()) {
    const std::string message = "mfcompile.runtime does not fit onnxruntime " + std::string(base->get_version()) + ": " +
                                fault + ". Load the model without it, and report this version";
    return g_api.create_status.call(kNotImplemented, message.c_str());
  }
  return guard([&] {
    static Domain* const domain = make_domain();  // shared by all sessions, for the life of the process
    check(g_api.add_domain.call(options, domain));
  });
}

// Name of the instruction set that is used under the cap (null or "" for none), or "" where it cannot be had.
MFCOMPILE_EXPORT const char* mfcompile_instruction_set(const char* cap) {
  const mfcompile::Kernels* kernels = mfcompile::choose_kernels(cap);
  return kernels ? kernels->name : "";
}

// Gives back memory that the weights of sessions so far do not fill.
MFCOMPILE_EXPORT void mfcompile_release_unused_memory() { mfcompile::release_unused_weight_memory(); }
