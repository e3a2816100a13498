// Kernels of this process's CUDA contexts, through the driver's library: nothing of CUDA is linked or included.
#pragma once
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>

#include "../../cuda/launch.h"

namespace vl2 {

// One compiled pack: `sm_87` … or `compute_80`, whose PTX the driver of any GPU compiles. The table ends in a null.
struct Image {
  const char* architecture;
  const void* bytes;
};
extern const Image IMAGES[];

constexpr const char* DOCTOR = "`vl2 doctor` says whether driver and kernels fit this GPU";

// The calls of cuda.h that are made, by name.
class Driver {
 public:
  int (*cuCtxGetCurrent)(void** context);
  int (*cuCtxGetDevice)(int* device);
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device);
  int (*cuModuleLoadData)(void** module, const void* image);
  int (*cuModuleGetFunction)(void** function, void* module, const char* name);
  int (*cuFuncSetAttribute)(void* function, int attribute, int value);
  int (*cuLaunchKernel)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                        void* stream, void** parameters, void** extra);

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  static void check(int status, const std::string& call) {
    if (status) throw Refused(call + " failed: CUDA error " + text(status), DOCTOR);
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw Refused("there is no CUDA driver on this machine (libcuda.so.1)", DOCTOR);
    find(library, "cuCtxGetCurrent", cuCtxGetCurrent);
    find(library, "cuCtxGetDevice", cuCtxGetDevice);
    find(library, "cuDeviceGetAttribute", cuDeviceGetAttribute);
    find(library, "cuModuleLoadData", cuModuleLoadData);
    find(library, "cuModuleGetFunction", cuModuleGetFunction);
    find(library, "cuFuncSetAttribute", cuFuncSetAttribute);
    find(library, "cuLaunchKernel", cuLaunchKernel);
  }

  template <class Call>
  static void find(void* library, const char* name, Call& call) {
    call = reinterpret_cast<Call>(dlsym(library, name));
    if (call == nullptr) throw Refused(std::string("the CUDA driver has no ") + name, DOCTOR);
  }
};

// The kernels of one context.
class Kernels {
 public:
  Kernels() {
    const Driver& driver = Driver::get();
    int device = 0, major = 0, minor = 0;
    Driver::check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice");
    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, …_MINOR
    Driver::check(driver.cuDeviceGetAttribute(&major, 75, device), "cuDeviceGetAttribute");
    Driver::check(driver.cuDeviceGetAttribute(&minor, 76, device), "cuDeviceGetAttribute");
    Driver::check(driver.cuModuleLoadData(&module_, image_of(major, minor)), "cuModuleLoadData");
  }

  // Those of the calling thread's context, loaded at first use and kept as long as the process.
  static Kernels& current() {
    static std::mutex guard;
    static std::map<void*, std::unique_ptr<Kernels>> held;
    void* context = nullptr;
    Driver::check(Driver::get().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
    if (context == nullptr) throw Refused("the calling thread has no CUDA context", DOCTOR);
    const std::lock_guard<std::mutex> lock(guard);
    auto& kernels = held[context];
    if (!kernels) kernels = std::make_unique<Kernels>();
    return *kernels;
  }

  // Puts a plan's kernels on a stream. buffers: device addresses by name; workspace: of the plan's scratch.
  void run(const Plan& plan, std::map<std::string, void*> buffers, void* workspace, void* stream) {
    char* place = static_cast<char*>(workspace);
    for (const auto& [name, size] : plan.workspace) {
      buffers[name] = place;
      place += aligned(size);
    }
    for (const Launch& launch : plan.launches) start(launch, buffers, stream);
  }

 private:
  static const void* image_of(int major, int minor) {
    const std::string exact = "sm_" + text(major) + text(minor);
    const void* portable = nullptr;
    std::string held;
    for (const Image* image = IMAGES; image->architecture; image++) {
      held += (held.empty() ? "" : ", ") + std::string(image->architecture);
      if (exact == image->architecture) return image->bytes;
      if (std::string("compute_80") == image->architecture) portable = image->bytes;
    }
    if (portable == nullptr)
      throw Refused("this library has kernels for " + held + ", and the GPU is " + exact,
                    "compile it again on this machine: python -m vl2.plugins.tensorrt.host");
    return portable;
  }

  void* function(const std::string& name, int64_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(guard_);
    auto found = functions_.find(name);
    if (found == functions_.end()) {
      void* made = nullptr;
      Driver::check(Driver::get().cuModuleGetFunction(&made, module_, name.c_str()), "cuModuleGetFunction of " + name);
      found = functions_.emplace(name, std::make_pair(made, int64_t{48 << 10})).first;
    }
    auto& [made, allowed] = found->second;
    // beyond 48 KB a kernel has to be allowed it: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (shared_bytes > allowed) {
      Driver::check(Driver::get().cuFuncSetAttribute(made, 8, static_cast<int>(shared_bytes)), "cuFuncSetAttribute");
      allowed = shared_bytes;
    }
    return made;
  }

  void start(const Launch& launch, const std::map<std::string, void*>& buffers, void* stream) {
    // addresses, int32 and float32 side by side; cuLaunchKernel takes where each lies
    union Parameter { void* address; int32_t whole; float real; };
    std::vector<Parameter> values(launch.arguments.size());
    std::vector<void*> places(launch.arguments.size());
    for (size_t i = 0; i < values.size(); i++) {
      const Argument& argument = launch.arguments[i];
      values[i].address = nullptr;
      if (const auto* name = std::get_if<std::string>(&argument)) values[i].address = buffers.at(*name);
      if (const auto* whole = std::get_if<int32_t>(&argument)) values[i].whole = *whole;
      if (const auto* real = std::get_if<float>(&argument)) values[i].real = *real;
      places[i] = &values[i];
    }
    const auto& [gx, gy, gz] = launch.grid;
    const auto& [bx, by, bz] = launch.block;
    Driver::check(Driver::get().cuLaunchKernel(function(launch.kernel, launch.shared_bytes), gx, gy, gz, bx, by, bz,
                                               launch.shared_bytes, stream, places.data(), nullptr),
                  "cuLaunchKernel of " + launch.kernel);
  }

  void* module_ = nullptr;
  std::mutex guard_;
  std::map<std::string, std::pair<void*, int64_t>> functions_;
};

}  // namespace vl2
