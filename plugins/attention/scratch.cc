#include "attention/scratch.h"

#include <cstdlib>

namespace vl2 {
namespace attention {
namespace {

struct Buffer {
  float* data = nullptr;
  size_t floats = 0;

  ~Buffer() { std::free(data); }
  float* grow(size_t wanted) {
    if (wanted <= floats) return data;
    std::free(data);
    const size_t rounded = (wanted + 1023) / 1024 * 1024;
    data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
    floats = data ? rounded : 0;
    return data;
  }
};

}  // namespace

float* scratch(Scratch kind, size_t floats) noexcept {
  thread_local Buffer buffers[2];
  return buffers[kind == Scratch::own].grow(floats);
}

}  // namespace attention
}  // namespace vl2
