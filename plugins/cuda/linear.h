// linear.py in C++: the launch plan of one product with a weight.
#pragma once
#include <algorithm>

#include "storage.h"

namespace vl2 {

constexpr int64_t THREADS = 128, ROWS = 32, STAGED_COLUMNS = 8192, TILE = 64, GEMV_TOKENS = 4;

struct LinearProblem {
  int64_t tokens, rows, columns;
  Storage storage;

  void check() const {
    require(std::min(tokens, rows) > 0, text(tokens) + " tokens and " + text(rows) + " rows", "one of each or more");
    storage.shift(columns);
  }
};

// Which buffers a product on tensor cores reads and writes; empty names are null pointers.
struct ProductRows {
  std::string weight, x, y;
  int64_t experts = 1;
  std::string source, target, offsets;
  int64_t stride = 1, offset = 0;
};

inline int64_t staged_bytes(int64_t columns) { return (std::min(tiles(columns, 32) * 32, STAGED_COLUMNS) + 32) * 4; }

inline Three product_grid(const LinearProblem& p, int64_t experts) {
  const int64_t deep = experts == 1 ? tiles(p.tokens, TILE) : tiles(2 * tiles(p.tokens, experts), TILE);
  return {tiles(p.rows, TILE), experts, deep};
}

inline int64_t product_bytes(const Storage& storage, int64_t streams) {
  const int64_t stages = storage.bits() == 4 ? 3 : 2;
  return stages * TILE * (144 + streams * (TILE * storage.bits() / 8 + 16));
}

inline Argument pointer(const std::string& name) { return name.empty() ? Argument() : Argument(name); }

inline Launch product_launch(const LinearProblem& p, const ProductRows& rows) {
  p.check();
  std::vector<Argument> arguments;
  p.storage.name(arguments, rows.weight);
  for (const auto& name : {rows.x, rows.source, rows.target, rows.offsets, rows.y}) arguments.push_back(pointer(name));
  for (int64_t value : {p.tokens, p.rows, p.columns, p.storage.shift(p.columns), rows.stride, rows.offset})
    arguments.push_back(number(value));
  return {"vl2_product_" + p.storage.scheme, product_grid(p, rows.experts), {THREADS, 1, 1},
          product_bytes(p.storage, 1), arguments};
}

inline Launch gemv_launch(const LinearProblem& p) {
  std::vector<Argument> arguments;
  p.storage.name(arguments, "weight");
  for (const char* name : {"x", "y"}) arguments.emplace_back(std::string(name));
  for (int64_t value : {p.rows, p.columns, p.storage.shift(p.columns)}) arguments.push_back(number(value));
  return {"vl2_linear_" + p.storage.scheme, {std::min<int64_t>(tiles(p.rows, ROWS), 1056), p.tokens, 1},
          {THREADS, 1, 1}, staged_bytes(p.columns), arguments};
}

inline Plan linear_plan(const LinearProblem& p) {
  p.check();
  return {{p.tokens <= GEMV_TOKENS ? gemv_launch(p) : product_launch(p, {"weight", "x", "y"})}, {}};
}

}  // namespace vl2
