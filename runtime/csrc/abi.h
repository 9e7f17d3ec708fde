// The part of onnxruntime's C API that this library uses, declared here because no Python package ships the headers.
//
// onnxruntime gives out one table of functions that only ever grows at its end, so the position of a function is a fact
// that holds for every version that has it. The positions are those of the public header onnxruntime_c_api.h (API 17 and
// later); test_api (custom_op.cc) tries at load what can be tried without a session.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mfcompile::abi {

struct Status;
struct Value;
struct TypeAndShape;
struct Domain;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10 };
enum ErrorCode : int { kOk = 0, kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

constexpr uint32_t kApiVersion = 20;       // of onnxruntime 1.20, the oldest that mfcompile supports
constexpr uint32_t kCustomOpVersion = 17;  // how many fields of CustomOp onnxruntime may read

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// OrtCustomOp. Version 17 ends with get_end_version; the fields behind it stay null and are not read.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory_type)(const CustomOp*, size_t);
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_same)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_status)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_status)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void* context);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  void* later_fields[4];
};

// One function of the table: its position and its type.
template <int Position, class Function>
struct Slot {
  Function* call = nullptr;
  void load(const void* const* table) { call = reinterpret_cast<Function*>(const_cast<void*>(table[Position])); }
};

struct Api {
  Slot<0, Status*(ErrorCode, const char*)> create_status;
  Slot<1, ErrorCode(const Status*)> get_error_code;
  Slot<2, const char*(const Status*)> get_error_message;
  Slot<26, Status*(const char*, Domain**)> create_domain;
  Slot<27, Status*(Domain*, const CustomOp*)> add_op;
  Slot<28, Status*(SessionOptions*, Domain*)> add_domain;
  Slot<51, Status*(Value*, void**)> get_tensor_data;
  Slot<57, Status*(TypeAndShape**)> create_shape;
  Slot<58, Status*(TypeAndShape*, ElementType)> set_element_type;
  Slot<59, Status*(TypeAndShape*, const int64_t*, size_t)> set_dimensions;
  Slot<60, Status*(const TypeAndShape*, ElementType*)> get_element_type;
  Slot<61, Status*(const TypeAndShape*, size_t*)> get_rank;
  Slot<62, Status*(const TypeAndShape*, int64_t*, size_t)> get_dimensions;
  Slot<64, Status*(const TypeAndShape*, size_t*)> get_element_count;
  Slot<65, Status*(const Value*, TypeAndShape**)> get_shape;
  Slot<88, Status*(const KernelContext*, size_t*)> get_input_count;
  Slot<90, Status*(const KernelContext*, size_t, const Value**)> get_input;
  Slot<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> get_output;
  Slot<93, void(Status*)> release_status;
  Slot<99, void(TypeAndShape*)> release_shape;
  Slot<163, Status*(const KernelInfo*, const char*, int64_t*, size_t*)> get_attribute_ints;
  Slot<244, Status*(const KernelInfo*, char*, size_t*)> get_node_name;
  Slot<249, Status*(const KernelInfo*, size_t, int*, const Value**)> get_constant_input;
  Slot<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)> parallel_for;

  void load(const void* const* table) {
    create_status.load(table), get_error_code.load(table), get_error_message.load(table);
    create_domain.load(table), add_op.load(table), add_domain.load(table);
    get_tensor_data.load(table), create_shape.load(table), set_element_type.load(table), set_dimensions.load(table);
    get_element_type.load(table), get_rank.load(table), get_dimensions.load(table), get_element_count.load(table);
    get_shape.load(table), get_input_count.load(table), get_input.load(table), get_output.load(table);
    release_status.load(table), release_shape.load(table), get_attribute_ints.load(table), get_node_name.load(table);
    get_constant_input.load(table), parallel_for.load(table);
  }
};

}  // namespace mfcompile::abi
