// What an operator's author sees of ONNX Runtime: signature, attributes, tensors, and a registration.
//
//     struct Linear {
//       static vl2::Signature signature();                    // name, inputs, outputs
//       explicit Linear(const vl2::Attributes&);              // reads and checks attributes, throws OpError
//       void compute(vl2::Call&) const;                       // one run, throws OpError
//     };
//     static const vl2::Registration<Linear> registration;    // in the operator's .cc file, nothing else to edit
#pragma once
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "native/ort_abi.h"
#include "native/parallel.h"

namespace vl2 {

// ONNX's element types; `any` leaves the choice to the graph.
enum class Type : int { any = 0, float32 = 1, uint8 = 2, int8 = 3, int32 = 6, int64 = 7, boolean = 9, float16 = 10,
                        bfloat16 = 16 };

// A wrong attribute, shape or type: what happened, with the value, and what was expected.
struct OpError : std::exception {
  explicit OpError(std::string text) : message(std::move(text)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

// Throws OpError(message) unless the condition holds.
inline void require(bool condition, const std::string& message) {
  if (!condition) throw OpError(message);
}

struct Port {
  const char* name;
  Type type;
  bool optional = false;
};

// in_place: pairs (input, output) that share memory: the output is the input's buffer, written in place.
struct Signature {
  const char* name;
  std::vector<Port> inputs, outputs;
  std::vector<std::pair<int, int>> in_place = {};
};

// A tensor of a run; data is null where an optional input is absent.
struct Tensor {
  Type type = Type::any;
  std::vector<int64_t> shape;
  void* data = nullptr;

  explicit operator bool() const { return data != nullptr; }
  // Elements; 1 for a scalar.
  size_t count() const;
  // Such as `[2, 3, 1280]`, for messages.
  std::string describe() const;
  template <typename T>
  T* as() const { return static_cast<T*>(data); }
};

// The attributes of a node. Names that are missing throw OpError, or give the fallback.
class Attributes {
 public:
  Attributes(const OrtApi* api, const OrtKernelInfo* info) : api_(api), info_(info) {}
  int64_t integer(const char* name) const;
  int64_t integer(const char* name, int64_t fallback) const;
  float number(const char* name) const;
  float number(const char* name, float fallback) const;
  std::string text(const char* name) const;
  std::string text(const char* name, const char* fallback) const;

 private:
  const OrtApi* api_;
  const OrtKernelInfo* info_;
};

// One run of a node.
class Call {
 public:
  Call(const OrtApi* api, OrtKernelContext* context, const Signature& signature)
      : api_(api), context_(context), signature_(signature) {}
  // The tensor of an input; one that holds no element has data that is not null and must not be read.
  Tensor input(size_t index) const;
  // Allocates the output and gives its memory.
  Tensor output(size_t index, const std::vector<int64_t>& shape);
  // ONNX Runtime's threads; tasks are handed out one by one.
  Parallel parallel();

 private:
  const OrtApi* api_;
  OrtKernelContext* context_;
  const Signature& signature_;
};

// Takes an operator into the table that RegisterCustomOps gives to ONNX Runtime.
void add_op(OrtCustomOp* op);
OrtStatus* status_of(const OrtApi* api, const char* op, const char* message);

template <typename Kernel>
class Registration {
 public:
  Registration() { add_op(&op()); }

 private:
  struct State {
    const OrtApi* api;
    Kernel kernel;
  };

  static const Signature& signature() {
    static const Signature held = Kernel::signature();
    return held;
  }

  static OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    try {
      *kernel = new State{api, Kernel(Attributes(api, info))};
      return nullptr;
    } catch (const std::exception& error) {
      return status_of(api, signature().name, error.what());
    }
  }

  static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const State& state = *static_cast<State*>(kernel);
    try {
      Call call(state.api, context, signature());
      state.kernel.compute(call);
      return nullptr;
    } catch (const std::exception& error) {
      return status_of(state.api, signature().name, error.what());
    }
  }

  static size_t in_place(int** inputs, int** outputs) {
    const auto& pairs = signature().in_place;
    *inputs = static_cast<int*>(std::malloc(pairs.size() * sizeof(int) + 1));
    *outputs = static_cast<int*>(std::malloc(pairs.size() * sizeof(int) + 1));
    for (size_t i = 0; i < pairs.size(); ++i) {
      (*inputs)[i] = pairs[i].first;
      (*outputs)[i] = pairs[i].second;
    }
    return pairs.size();
  }

  static OrtCustomOp& op() {
    static OrtCustomOp held = [] {
      OrtCustomOp op{};
      op.version = ort::API_VERSION;
      op.GetName = [](const OrtCustomOp*) { return signature().name; };
      op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
      op.GetInputType = [](const OrtCustomOp*, size_t i) { return int(signature().inputs[i].type); };
      op.GetInputTypeCount = [](const OrtCustomOp*) { return signature().inputs.size(); };
      op.GetOutputType = [](const OrtCustomOp*, size_t i) { return int(signature().outputs[i].type); };
      op.GetOutputTypeCount = [](const OrtCustomOp*) { return signature().outputs.size(); };
      op.KernelDestroy = [](void* kernel) { delete static_cast<State*>(kernel); };
      op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return int(signature().inputs[i].optional); };
      op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return int(signature().outputs[i].optional); };
      op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
      op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
      op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
      op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
      op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
      op.CreateKernelV2 = create;
      op.KernelComputeV2 = compute;
      op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
      op.GetEndVersion = [](const OrtCustomOp*) { return 1 << 20; };
      if (!signature().in_place.empty()) {
        op.GetAliasMap = in_place;
        op.ReleaseAliasMap = [](int* inputs, int* outputs) { std::free(inputs), std::free(outputs); };
      }
      return op;
    }();
    return held;
  }
};

}  // namespace vl2
