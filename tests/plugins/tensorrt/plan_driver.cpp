// The C++ launch plans as text, for test_host_plans.py.
#include <sstream>

#include "operators.h"

using namespace vl2;

namespace {

std::string answer;

// Lines `name kind value` with kind i, f or s.
Attributes read_attributes(const char* words) {
  std::istringstream lines(words);
  Attributes given;
  for (std::string name, kind, value; lines >> name >> kind >> value;) {
    if (kind == "i") given.values[name] = static_cast<int32_t>(std::stol(value));
    if (kind == "f") given.values[name] = std::stof(value);
    if (kind == "s") given.values[name] = value;
  }
  return given;
}

// A line an input: `rank side side …`.
std::vector<Shape> read_shapes(const char* words) {
  std::istringstream numbers(words);
  std::vector<Shape> shapes;
  for (size_t rank; numbers >> rank;) {
    shapes.emplace_back(rank);
    for (int64_t& side : shapes.back()) numbers >> side;
  }
  return shapes;
}

const Operator& find(const char* name) {
  for (const Operator& one : operators())
    if (one.name == name) return one;
  throw std::logic_error(name);
}

std::string written(const Argument& argument) {
  if (const auto* name = std::get_if<std::string>(&argument)) return "\"" + *name + "\"";
  if (const auto* whole = std::get_if<int32_t>(&argument)) return std::to_string(*whole);
  if (const auto* real = std::get_if<float>(&argument)) {
    char words[40];
    snprintf(words, sizeof words, "{\"float\": %.9g}", *real);
    return words;
  }
  return "null";
}

template <class List, class Write>
std::string joined(const List& list, Write write) {
  std::string all;
  for (const auto& one : list) all += (all.empty() ? "" : ", ") + write(one);
  return "[" + all + "]";
}

std::string written(const Plan& plan) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const auto launches = joined(plan.launches, [&](const Launch& one) {
    return "[\"" + one.kernel + "\", " + joined(one.grid, number) + ", " + joined(one.block, number) + ", " +
           number(one.shared_bytes) + ", " +
           joined(one.arguments, [](const Argument& each) { return written(each); }) + "]";
  });
  const auto workspace = joined(plan.workspace, [&](const auto& one) {
    return "[\"" + one.first + "\", " + number(one.second) + "]";
  });
  return "{\"launches\": " + launches + ", \"workspace\": " + workspace + "}";
}

template <class Work>
const char* told(Work work) {
  try {
    answer = work();
  } catch (const Refused& error) {
    answer = std::string("refused\n") + error.what() + "\n" + error.hint;
  }
  return answer.c_str();
}

}  // namespace

extern "C" const char* plan_of(const char* name, const char* attributes, const char* sides) {
  return told([&] {
    const Operator& made = find(name);
    const Attributes given = read_attributes(attributes);
    const auto inputs = made.inputs(given);
    const auto shapes = read_shapes(sides);
    Shapes named;
    for (size_t i = 0; i < inputs.size(); i++) named[inputs[i].name] = shapes.at(i);
    return written(made.plan(given, named));
  });
}

extern "C" const char* workspace_of(const char* name, const char* attributes, const char* low, const char* high) {
  return told([&] {
    const auto least = read_shapes(low), most = read_shapes(high);
    return std::to_string(largest_workspace(find(name), read_attributes(attributes), least, most));
  });
}

extern "C" const char* tensors_of(const char* name, const char* attributes) {
  return told([&] {
    const Operator& made = find(name);
    const auto inputs = joined(made.inputs(read_attributes(attributes)), [](const Tensor& one) {
      return "[\"" + one.name + "\", \"" + type_name(one.type) + "\"]";
    });
    const auto outputs = joined(made.outputs, [](const Output& one) {
      return "[\"" + one.name + "\", \"" + one.like + "\", \"" + one.last + "\", " +
             (one.in_place ? "true" : "false") + "]";
    });
    const auto fields = joined(made.fields, [](const auto& one) {
      return "[\"" + one.first + "\", " + std::to_string(one.second.index()) + "]";
    });
    return "[" + inputs + ", " + outputs + ", " + fields + "]";
  });
}
