// storage.py in C++: how a weight lies in memory.
#pragma once
#include "launch.h"

namespace vl2 {

struct Storage {
  std::string scheme = "fp16";
  int64_t group_size = 0;

  Storage() = default;
  Storage(std::string name, int64_t size) : scheme(std::move(name)), group_size(size) {
    const bool known = scheme == "int4" || scheme == "int8" || scheme == "fp16";
    require(known, "weights of scheme `" + scheme + "`", "one of int4, int8, fp16");
  }

  int64_t bits() const { return scheme == "int4" ? 4 : scheme == "int8" ? 8 : 16; }

  // log2 of the group size for rows of `columns`, 31 for one scale a row.
  int64_t shift(int64_t columns) const {
    const int64_t unit = scheme == "int8" ? 16 : 8, size = group_size;
    require(columns > 0 && columns % unit == 0, scheme + " rows of " + text(columns) + " columns",
            "a multiple of " + text(unit));
    if (scheme == "fp16" || size == columns) return 31;
    require(size >= 16 && (size & (size - 1)) == 0 && columns % size == 0,
            "groups of " + text(size) + " in rows of " + text(columns), "a power of two from 16, or the row");
    return 63 - __builtin_clzll(size);
  }

  // Appends the buffers of a weight, codes and scales; null pointers where it is absent.
  void name(std::vector<Argument>& arguments, const std::string& weight, bool present = true) const {
    arguments.push_back(present ? Argument(weight) : Argument());
    arguments.push_back(present && scheme != "fp16" ? Argument(weight + "_scale") : Argument());
  }
};

}  // namespace vl2
