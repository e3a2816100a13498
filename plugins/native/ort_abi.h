// The part of ONNX Runtime's C interface that custom operators need, declared by its slots.
//
// ONNX Runtime hands out a table of function pointers that only grows: a slot's place and signature never change. Only
// the used slots are named here, by their documented place; `check_ort` in registry.cc tries them before they are used.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

// The table of version 18 (onnxruntime 1.18), all 280 slots of it.
struct OrtApi {
  void* slots[280];
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// An operator as ONNX Runtime reads it; `version` says how many of the members below exist.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  // since version 16
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  // since version 17
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  // since version 18
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

namespace vl2::ort {

constexpr uint32_t API_VERSION = 18;
enum ErrorCode : int { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Presence : int { REQUIRED = 0, OPTIONAL = 1 };

// A slot of the table: its place and the type of the function there.
template <size_t Place, typename Function>
struct Slot {
  static_assert(Place < sizeof(OrtApi) / sizeof(void*));
  Function* operator()(const OrtApi* api) const { return reinterpret_cast<Function*>(api->slots[Place]); }
};

using Info = OrtKernelInfo;
using Context = OrtKernelContext;
using Shape = OrtTensorTypeAndShapeInfo;
using Task = void(void* data, size_t index);

constexpr Slot<0, OrtStatus*(int code, const char* message)> create_status;
constexpr Slot<1, int(const OrtStatus*)> error_code;
constexpr Slot<2, const char*(const OrtStatus*)> error_message;
constexpr Slot<26, OrtStatus*(const char* domain, OrtCustomOpDomain**)> create_domain;
constexpr Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> add_to_domain;
constexpr Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> add_domain;
constexpr Slot<51, OrtStatus*(OrtValue*, void** data)> tensor_data;
constexpr Slot<57, OrtStatus*(Shape**)> create_shape;
constexpr Slot<58, OrtStatus*(Shape*, int type)> set_type;
constexpr Slot<59, OrtStatus*(Shape*, const int64_t* sides, size_t rank)> set_sides;
constexpr Slot<60, OrtStatus*(const Shape*, int* type)> get_type;
constexpr Slot<61, OrtStatus*(const Shape*, size_t* rank)> get_rank;
constexpr Slot<62, OrtStatus*(const Shape*, int64_t* sides, size_t rank)> get_sides;
constexpr Slot<65, OrtStatus*(const OrtValue*, Shape**)> tensor_shape;
constexpr Slot<85, OrtStatus*(const Info*, const char* name, float*)> attribute_float;
constexpr Slot<86, OrtStatus*(const Info*, const char* name, int64_t*)> attribute_int;
constexpr Slot<87, OrtStatus*(const Info*, const char* name, char* text, size_t* size)> attribute_string;
constexpr Slot<88, OrtStatus*(const Context*, size_t*)> input_count;
constexpr Slot<90, OrtStatus*(const Context*, size_t index, const OrtValue**)> input;
constexpr Slot<91, OrtStatus*(Context*, size_t index, const int64_t* sides, size_t rank, OrtValue**)> output;
constexpr Slot<93, void(OrtStatus*)> release_status;
constexpr Slot<99, void(Shape*)> release_shape;
constexpr Slot<101, void(OrtCustomOpDomain*)> release_domain;
constexpr Slot<274, OrtStatus*(const Context*, Task*, size_t count, size_t batches, void* data)> parallel_for;

}  // namespace vl2::ort
