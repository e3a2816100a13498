#include "native/op.h"

#include <memory>

namespace vl2 {
namespace {

// Throws what a call of ONNX Runtime complains of.
void check(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = ort::error_message(api)(status);
  ort::release_status(api)(status);
  throw OpError(message);
}

// Whether the call went well; its complaint is dropped.
bool succeeded(const OrtApi* api, OrtStatus* status) {
  if (status != nullptr) ort::release_status(api)(status);
  return status == nullptr;
}

std::string missing(const char* name) { return std::string("the attribute `") + name + "` is missing or of another type"; }

}  // namespace

size_t Tensor::count() const {
  size_t elements = 1;
  for (int64_t side : shape) elements *= size_t(side);
  return elements;
}

std::string Tensor::describe() const {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

int64_t Attributes::integer(const char* name) const {
  int64_t value = 0;
  require(succeeded(api_, ort::attribute_int(api_)(info_, name, &value)), missing(name));
  return value;
}

int64_t Attributes::integer(const char* name, int64_t fallback) const {
  int64_t value = 0;
  return succeeded(api_, ort::attribute_int(api_)(info_, name, &value)) ? value : fallback;
}

float Attributes::number(const char* name) const {
  float value = 0;
  require(succeeded(api_, ort::attribute_float(api_)(info_, name, &value)), missing(name));
  return value;
}

float Attributes::number(const char* name, float fallback) const {
  float value = 0;
  return succeeded(api_, ort::attribute_float(api_)(info_, name, &value)) ? value : fallback;
}

std::string Attributes::text(const char* name) const {
  size_t size = 0;
  require(succeeded(api_, ort::attribute_string(api_)(info_, name, nullptr, &size)), missing(name));
  std::string value(size, '\0');
  check(api_, ort::attribute_string(api_)(info_, name, value.data(), &size));
  return value.c_str();
}

std::string Attributes::text(const char* name, const char* fallback) const {
  size_t size = 0;
  return succeeded(api_, ort::attribute_string(api_)(info_, name, nullptr, &size)) ? text(name) : fallback;
}

Tensor Call::input(size_t index) const {
  size_t given = 0;
  check(api_, ort::input_count(api_)(context_, &given));
  const OrtValue* value = nullptr;
  if (index < given) check(api_, ort::input(api_)(context_, index, &value));
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* held = nullptr;
  check(api_, ort::tensor_shape(api_)(value, &held));
  const auto release = ort::release_shape(api_);
  std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> info(held, release);
  int type = 0;
  size_t rank = 0;
  check(api_, ort::get_type(api_)(info.get(), &type));
  check(api_, ort::get_rank(api_)(info.get(), &rank));
  tensor.type = Type(type);
  tensor.shape.resize(rank);
  check(api_, ort::get_sides(api_)(info.get(), tensor.shape.data(), rank));
  check(api_, ort::tensor_data(api_)(const_cast<OrtValue*>(value), &tensor.data));
  // an empty tensor may have no memory, but it is not absent
  static char nothing;
  if (tensor.data == nullptr) tensor.data = &nothing;
  return tensor;
}

Tensor Call::output(size_t index, const std::vector<int64_t>& shape) {
  OrtValue* value = nullptr;
  check(api_, ort::output(api_)(context_, index, shape.data(), shape.size(), &value));
  Tensor tensor{signature_.outputs[index].type, shape, nullptr};
  check(api_, ort::tensor_data(api_)(value, &tensor.data));
  return tensor;
}

Parallel Call::parallel() {
  return {this, [](void* context, void (*task)(void*, size_t), size_t count, void* data) {
            Call& call = *static_cast<Call*>(context);
            // a batch of its own for each task lets fast threads take more of them
            check(call.api_, ort::parallel_for(call.api_)(call.context_, task, count, count, data));
          }};
}

}  // namespace vl2
