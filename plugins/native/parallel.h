// How kernels run tasks side by side without knowing whose threads they are.
#pragma once
#include <cstddef>

namespace vl2 {

// Runs task(data, index) for every index below count, in any order, and returns when all are done. Tasks must not
// throw. In ONNX Runtime `run` is its own thread pool (op.cc), in tests a plain one.
struct Parallel {
  void* context;
  void (*run)(void* context, void (*task)(void* data, size_t index), size_t count, void* data);
};

// Runs body(index) for every index below count.
template <typename Body>
void parallel_for(const Parallel& parallel, size_t count, const Body& body) {
  if (count == 0) return;
  auto task = [](void* data, size_t index) { (*static_cast<const Body*>(data))(index); };
  parallel.run(parallel.context, task, count, const_cast<Body*>(&body));
}

}  // namespace vl2
