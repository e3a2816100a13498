// Enough of ONNX Runtime's table to make and run operators without it: under sanitizers and emulators.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "native/op.h"

struct OrtStatus { std::string message; int code; };
struct OrtTensorTypeAndShapeInfo { int type; std::vector<int64_t> sides; };
struct OrtKernelInfo {
  std::map<std::string, int64_t> ints;
  std::map<std::string, float> floats;
  std::map<std::string, std::string> texts;
};
// Memory is exactly as large as the tensor, so that a sanitizer sees the first byte beyond.
struct OrtValue {
  int type = 0;
  std::vector<int64_t> sides;
  std::unique_ptr<char[]> data;
};
struct OrtKernelContext {
  std::vector<const OrtValue*> inputs;
  OrtValue output;
  size_t threads = 1;
};
struct OrtCustomOpDomain { std::vector<const OrtCustomOp*> ops; };
struct OrtSessionOptions { OrtCustomOpDomain* domain; };

namespace fake {

inline size_t bytes_of(int type) { return type == 1 ? 4 : 1; }

inline OrtValue value(int type, std::vector<int64_t> sides, const void* source = nullptr) {
  size_t size = bytes_of(type);
  for (int64_t side : sides) size *= size_t(side);
  OrtValue made{type, std::move(sides), std::unique_ptr<char[]>(new char[size])};
  if (source != nullptr && size > 0) std::memcpy(made.data.get(), source, size);
  return made;
}

inline OrtStatus* status(int code, const char* message) { return new OrtStatus{message, code}; }

template <typename Map, typename T>
OrtStatus* find(const Map& map, const char* name, T* out) {
  auto found = map.find(name);
  if (found == map.end()) return status(1, "no such attribute");
  *out = found->second;
  return nullptr;
}

inline OrtStatus* text(const OrtKernelInfo* info, const char* name, char* out, size_t* size) {
  auto found = info->texts.find(name);
  if (found == info->texts.end()) return status(1, "no such attribute");
  if (out != nullptr) std::memcpy(out, found->second.c_str(), found->second.size() + 1);
  *size = found->second.size() + 1;
  return nullptr;
}

inline OrtStatus* parallel(const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t, void* data) {
  std::vector<std::thread> threads;
  for (size_t t = 1; t < context->threads; ++t)
    threads.emplace_back([=] { for (size_t i = t; i < count; i += context->threads) task(data, i); });
  for (size_t i = 0; i < count; i += context->threads) task(data, i);
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}

template <size_t Place, typename Function>
void set(OrtApi& api, const vl2::ort::Slot<Place, Function>&, Function* function) {
  api.slots[Place] = reinterpret_cast<void*>(function);
}

inline const OrtApi& api() {
  namespace ort = vl2::ort;
  static const OrtApi held = [] {
    OrtApi a{};
    set(a, ort::create_status, +[](int code, const char* m) { return status(code, m); });
    set(a, ort::error_code, +[](const OrtStatus* s) { return s->code; });
    set(a, ort::error_message, +[](const OrtStatus* s) { return s->message.c_str(); });
    set(a, ort::release_status, +[](OrtStatus* s) { delete s; });
    set(a, ort::create_domain, +[](const char*, OrtCustomOpDomain** d) -> OrtStatus* { *d = new OrtCustomOpDomain; return nullptr; });
    set(a, ort::add_to_domain, +[](OrtCustomOpDomain* d, const OrtCustomOp* o) -> OrtStatus* { d->ops.push_back(o); return nullptr; });
    set(a, ort::add_domain, +[](OrtSessionOptions* o, OrtCustomOpDomain* d) -> OrtStatus* { o->domain = d; return nullptr; });
    set(a, ort::tensor_data, +[](OrtValue* v, void** d) -> OrtStatus* { *d = v->data.get(); return nullptr; });
    set(a, ort::create_shape, +[](ort::Shape** s) -> OrtStatus* { *s = new ort::Shape{}; return nullptr; });
    set(a, ort::set_type, +[](ort::Shape* s, int type) -> OrtStatus* { s->type = type; return nullptr; });
    set(a, ort::set_sides, +[](ort::Shape* s, const int64_t* d, size_t n) -> OrtStatus* { s->sides.assign(d, d + n); return nullptr; });
    set(a, ort::get_type, +[](const ort::Shape* s, int* type) -> OrtStatus* { *type = s->type; return nullptr; });
    set(a, ort::get_rank, +[](const ort::Shape* s, size_t* n) -> OrtStatus* { *n = s->sides.size(); return nullptr; });
    set(a, ort::get_sides, +[](const ort::Shape* s, int64_t* d, size_t n) -> OrtStatus* {
      for (size_t i = 0; i < n; ++i) d[i] = s->sides[i];
      return nullptr;
    });
    set(a, ort::tensor_shape, +[](const OrtValue* v, ort::Shape** s) -> OrtStatus* { *s = new ort::Shape{v->type, v->sides}; return nullptr; });
    set(a, ort::release_shape, +[](ort::Shape* s) { delete s; });
    set(a, ort::attribute_int, +[](const ort::Info* i, const char* n, int64_t* v) { return find(i->ints, n, v); });
    set(a, ort::attribute_float, +[](const ort::Info* i, const char* n, float* v) { return find(i->floats, n, v); });
    set(a, ort::attribute_string, +[](const ort::Info* i, const char* n, char* v, size_t* s) { return text(i, n, v, s); });
    set(a, ort::input_count, +[](const ort::Context* c, size_t* n) -> OrtStatus* { *n = c->inputs.size(); return nullptr; });
    set(a, ort::input, +[](const ort::Context* c, size_t i, const OrtValue** v) -> OrtStatus* { *v = c->inputs[i]; return nullptr; });
    set(a, ort::output, +[](ort::Context* c, size_t, const int64_t* d, size_t n, OrtValue** v) -> OrtStatus* {
      c->output = value(1, std::vector<int64_t>(d, d + n));
      *v = &c->output;
      return nullptr;
    });
    set(a, ort::parallel_for, +[](const ort::Context* c, ort::Task* t, size_t n, size_t b, void* d) { return parallel(c, t, n, b, d); });
    return a;
  }();
  return held;
}

}  // namespace fake

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);

namespace fake {

// The operator of that name, through the entry point that onnxruntime uses.
inline const OrtCustomOp* op(const std::string& name) {
  static const OrtApiBase base{[](uint32_t) { return &api(); }, [] { return "1.31.1"; }};
  static OrtSessionOptions options{nullptr};
  if (options.domain == nullptr && RegisterCustomOps(&options, &base) != nullptr) return nullptr;
  for (const OrtCustomOp* op : options.domain->ops)
    if (name == op->GetName(op)) return op;
  return nullptr;
}

// Makes a node and runs it once; the complaint, or "" and the output in the context.
inline std::string run(const std::string& name, const OrtKernelInfo& info, OrtKernelContext& context) {
  const OrtCustomOp* made = op(name);
  void* kernel = nullptr;
  std::unique_ptr<OrtStatus> failed(made->CreateKernelV2(made, &api(), &info, &kernel));
  if (failed) return failed->message;
  failed.reset(made->KernelComputeV2(kernel, &context));
  made->KernelDestroy(kernel);
  return failed ? failed->message : "";
}

}  // namespace fake
