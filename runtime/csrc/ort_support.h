// What every operator of this library needs of onnxruntime: tensors, errors, threads, and the fields of an operator.
#pragma once

#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "abi.h"
#include "sparse_linear.h"

namespace mfcompile {

using namespace abi;

inline constexpr const char* kCapVariable = "MFCOMPILE_RUNTIME_CPU";

inline Api g_api;  // filled once by RegisterCustomOps, before any kernel exists

// An error on its way to onnxruntime.
struct Refusal {
  ErrorCode code;
  std::string message;
};

inline void check(Status* status) {
  if (!status) return;
  Refusal refusal{g_api.get_error_code.call(status), g_api.get_error_message.call(status)};
  g_api.release_status.call(status);
  throw refusal;
}

// Runs a body that may throw; nothing may be thrown into onnxruntime, which is compiled by another compiler.
template <class Body>
Status* guard(Body body) {
  try {
    body();
    return nullptr;
  } catch (const Refusal& refusal) {
    return g_api.create_status.call(refusal.code, refusal.message.c_str());
  } catch (const std::exception& error) {
    return g_api.create_status.call(kFail, error.what());
  }
}

struct Tensor {
  ElementType type;
  std::vector<int64_t> shape;
  size_t count;
  const void* data;
};

inline Tensor read_tensor(const Value* value) {
  TypeAndShape* info = nullptr;
  check(g_api.get_shape.call(value, &info));
  const std::unique_ptr<TypeAndShape, void (*)(TypeAndShape*)> owner(info, g_api.release_shape.call);
  Tensor tensor{};
  size_t rank = 0;
  check(g_api.get_element_type.call(info, &tensor.type));
  check(g_api.get_rank.call(info, &rank));
  tensor.shape.resize(rank);
  check(g_api.get_dimensions.call(info, tensor.shape.data(), rank));
  check(g_api.get_element_count.call(info, &tensor.count));
  void* data = nullptr;
  check(g_api.get_tensor_data.call(const_cast<Value*>(value), &data));
  tensor.data = data;
  return tensor;
}

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + ")";
}

inline std::string name_of(const KernelInfo* info) {
  char name[256] = "";
  size_t size = sizeof name;
  Status* status = g_api.get_node_name.call(info, name, &size);
  if (!status) return name;
  g_api.release_status.call(status);
  return "";
}

class OrtParallel final : public Parallel {
 public:
  explicit OrtParallel(const KernelContext* context) : context_(context) {}
  void run(void (*task)(void*, size_t), size_t count, void* argument) const override {
    Work work{task, argument, {}, {}};
    check(g_api.parallel_for.call(context_, run_one, count, 0, &work));
    if (work.error) std::rethrow_exception(work.error);
  }

 private:
  struct Work {
    void (*task)(void*, size_t);
    void* argument;
    std::mutex mutex;
    std::exception_ptr error;
  };
  static void run_one(void* held, size_t index) {
    Work& work = *static_cast<Work*>(held);
    try {
      work.task(work.argument, index);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(work.mutex);
      work.error = std::current_exception();
    }
  }
  const KernelContext* context_;
};

// A constant input; `node` names the node in the refusal of one that is not constant.
inline Tensor read_constant(const std::string& node, const KernelInfo* info, size_t index, const char* what) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(g_api.get_constant_input.call(info, index, &is_constant, &value));
  if (!is_constant || !value) {
    throw Refusal{kInvalidArgument,
                  node + " needs constant " + what + ": store them as an initializer that is no input"};
  }
  return read_tensor(value);
}

// The fields of an operator of one output whose kernels are made and run by `Kernel`; names, inputs and create_kernel_status are its own.
template <class Kernel>
void set_common_fields(CustomOp& op) {
  op.version = kCustomOpVersion;
  op.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
  op.get_output_type = [](const CustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const CustomOp*) -> size_t { return 1; };
  op.get_output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
  const auto no_variadic = [](const CustomOp*) { return 0; };
  op.get_variadic_input_min = op.get_variadic_input_same = no_variadic;
  op.get_variadic_output_min = op.get_variadic_output_same = no_variadic;
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return std::numeric_limits<int>::max(); };
  op.compute_status = [](void* kernel, KernelContext* context) -> Status* {
    return guard([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace mfcompile
