// How kernels run tasks side by side without knowing whose threads they are.
#pragma once
#include <cstddef>
#include <exception>
#include <mutex>

namespace vl2 {

// Runs task(data, index) for every index below count, in any order, and returns when all are done. Tasks must not
// throw. In ONNX Runtime `run` is its own thread pool (op.cc), in tests a plain one.
struct Parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* data, size_t index), size_t count, void* data);
};

// Runs body(index) for every index below count; what a body throws (first) is thrown here when all are done.
template <typename Body>
void parallel_for(const Parallel& parallel, size_t count, const Body& body) {
  struct State {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } state{body, {}, nullptr};
  auto task = [](void* data, size_t index) {
    State& state = *static_cast<State*>(data);
    try {
      state.body(index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(state.mutex);
      if (!state.error) state.error = std::current_exception();
    }
  };
  if (count > 0) parallel.run(parallel.context, task, count, &state);
  if (state.error) std::rethrow_exception(state.error);
}

}  // namespace vl2
