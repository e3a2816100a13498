// The entry point that onnxruntime calls, and the check that this onnxruntime is one whose slots are known.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "native/op.h"

namespace vl2 {
namespace {

constexpr char DOMAIN_NAME[] = "vl2";

std::vector<OrtCustomOp*>& table() {
  static std::vector<OrtCustomOp*> ops;
  return ops;
}

OrtStatus* refuse(const OrtApi* api, const std::string& reason) {
  return ort::create_status(api)(ort::FAIL, ("vl2's operator library: " + reason).c_str());
}

// A shape written and read back through the slots gives itself.
bool shapes_round_trip(const OrtApi* api) {
  const int64_t sides[2] = {3, 1280};
  int64_t read[2] = {0, 0};
  int type = 0;
  size_t rank = 0;
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  if (ort::create_shape(api)(&shape) != nullptr) return false;
  const bool done = ort::set_type(api)(shape, int(Type::float32)) == nullptr &&
                    ort::set_sides(api)(shape, sides, 2) == nullptr &&
                    ort::get_type(api)(shape, &type) == nullptr && ort::get_rank(api)(shape, &rank) == nullptr &&
                    rank == 2 && ort::get_sides(api)(shape, read, 2) == nullptr;
  ort::release_shape(api)(shape);
  return done && type == int(Type::float32) && std::memcmp(sides, read, sizeof sides) == 0;
}

// Null where this onnxruntime can be used, else the refusal.
OrtStatus* check_ort(const OrtApiBase* base) {
  const char* version = base->GetVersionString();
  // slot 0 is as old as the interface, so that a refusal can be worded on any version
  const OrtApi* oldest = base->GetApi(1);
  char* rest = nullptr;
  const long major = std::strtol(version, &rest, 10);
  const long minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : -1;
  const std::string found = std::string("onnxruntime ") + version;
  if (major != 1 || minor < long(ort::API_VERSION))
    return refuse(oldest, "needs onnxruntime 1.18 or a later 1.x, found " + found);
  const OrtApi* api = base->GetApi(ort::API_VERSION);
  if (api == nullptr) return refuse(oldest, found + " does not offer version 18 of its interface");
  OrtStatus* probe = ort::create_status(api)(ort::INVALID_ARGUMENT, "probe");
  const bool same = ort::error_code(api)(probe) == ort::INVALID_ARGUMENT &&
                    std::strcmp(ort::error_message(api)(probe), "probe") == 0;
  ort::release_status(api)(probe);
  if (!same || !shapes_round_trip(api)) return refuse(oldest, "the interface of " + found + " is not as declared");
  return nullptr;
}

}  // namespace

void add_op(OrtCustomOp* op) { table().push_back(op); }

OrtStatus* status_of(const OrtApi* api, const char* op, const char* message) {
  return ort::create_status(api)(ort::INVALID_ARGUMENT, ("vl2::" + std::string(op) + ": " + message).c_str());
}

OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base) {
  if (OrtStatus* refusal = check_ort(base)) return refusal;
  const OrtApi* api = base->GetApi(ort::API_VERSION);
  // one domain for the process: sessions keep pointers into it, and may be opened by several threads
  static OrtCustomOpDomain* domain = nullptr;
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    OrtCustomOpDomain* made = nullptr;
    if (OrtStatus* status = ort::create_domain(api)(DOMAIN_NAME, &made)) return status;
    for (const OrtCustomOp* op : table())
      if (OrtStatus* status = ort::add_to_domain(api)(made, op)) return status;
    domain = made;
  }
  return ort::add_domain(api)(options, domain);
}

}  // namespace vl2

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                                 const OrtApiBase* base) {
  return vl2::register_ops(options, base);
}
