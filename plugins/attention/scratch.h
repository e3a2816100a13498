// Memory that a thread keeps from run to run: fresh pages would cost more than the attention of a short context.
#pragma once
#include <cstddef>

namespace vl2 {
namespace attention {

// shared: of the thread that runs the operator, read and written by its tasks; own: of the thread that runs a task.
enum class Scratch { shared, own };

// `floats` floats aligned to 64 bytes, valid until the next call of the same thread and kind; null without memory.
float* scratch(Scratch kind, size_t floats) noexcept;

}  // namespace attention
}  // namespace vl2
