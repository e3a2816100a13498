// Checks that both attention operators make of their inputs, in words.
#pragma once
#include <string>
#include <vector>

#include "attention/problem.h"
#include "native/isa.h"
#include "native/op.h"

namespace vl2 {
namespace attention {

// Throws OpError unless the tensor has this shape.
void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& wanted);

// A side of a tensor that must have `rank` sides.
int64_t side(const Tensor& tensor, const char* name, size_t rank, size_t index);

// data and, for INT8, scales [rows_shape without its last side's values ..., parts]; scale absent for other types.
Cache make_cache(const Tensor& data, const Tensor& scale, const char* name, const std::vector<int64_t>& scale_shape);

// Past lengths of each batch entry, checked against the capacity.
std::vector<int64_t> past_lengths(const Tensor& past, int64_t batch, int64_t tokens, int64_t capacity);

// The row of the caches of each batch entry: `rows` checked, or 0 … batch − 1 where it is absent.
std::vector<int64_t> cache_rows(const Tensor& rows, int64_t batch, int64_t slots);

// Runs the problem with the kernel of `isa`, each batch entry as if it were alone: no bit depends on the others.
void run(const Problem& problem, Isa isa, const Parallel& parallel);

}  // namespace attention
}  // namespace vl2
