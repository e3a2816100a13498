// The operators as IPluginV3 in C++, for programs without Python: plugin.py's names, fields, types, shapes and
// workspace, so that engines which one host built run with the other. Compiled on the device by ../host.py.
#include <NvInfer.h>

#include <cstdio>
#include <cstring>

#include "driver.h"
#include "operators.h"

using namespace nvinfer1;

namespace vl2 {
namespace {

ILoggerFinder* finder = nullptr;
std::mutex telling;
std::string told;

// TensorRT says no more than that a plugin failed: its logger gets the reason or, as TensorRT-RTX 1.7 hands none on,
// standard error; vl2_plugin_error has what was refused first.
void tell(const std::exception& error) noexcept {
  const auto* refused = dynamic_cast<const Refused*>(&error);
  const std::string words = std::string(error.what()) + (refused ? "\n" + refused->hint : "");
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, words.c_str());
  else std::fprintf(stderr, "vl2: %s\n", words.c_str());
  const std::lock_guard<std::mutex> lock(telling);
  if (told.empty()) told = words;
}

// What `work` gives, or `failed` where it throws.
template <class Result, class Work>
Result guarded(Result failed, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    tell(error);
    return failed;
  }
}

DataType data_type(Type type) {
  switch (type) {
    case Type::float16: return DataType::kHALF;
    case Type::float32: return DataType::kFLOAT;
    case Type::int8: return DataType::kINT8;
    case Type::int64: return DataType::kINT64;
  }
  return DataType::kFLOAT;
}

std::string name_of(DataType type) {
  for (Type one : {Type::float16, Type::float32, Type::int8, Type::int64})
    if (data_type(one) == type) return type_name(one);
  return "TensorRT's type " + text(static_cast<int>(type));
}

Shape shape_of(const Dims& dims) { return Shape(dims.d, dims.d + dims.nbDims); }

// A field with its value at `value`; text has no end mark, and an empty one has one.
PluginField field_of(const std::string& name, const Value& value) {
  if (const auto* word = std::get_if<std::string>(&value))
    return {name.c_str(), word->c_str(), PluginFieldType::kCHAR, std::max(1, static_cast<int32_t>(word->size()))};
  if (const auto* real = std::get_if<float>(&value)) return {name.c_str(), real, PluginFieldType::kFLOAT32, 1};
  return {name.c_str(), &std::get<int32_t>(value), PluginFieldType::kINT32, 1};
}

template <class Number>
Number read(const PluginField& field) {
  Number value;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

Value value_of(const PluginField& field) {
  switch (field.type) {
    case PluginFieldType::kCHAR: {
      std::string word(static_cast<const char*>(field.data), field.length);
      word.erase(std::find(word.begin(), word.end(), '\0'), word.end());
      return word;
    }
    case PluginFieldType::kFLOAT32: return read<float>(field);
    case PluginFieldType::kFLOAT64: return static_cast<float>(read<double>(field));
    case PluginFieldType::kINT32: return read<int32_t>(field);
    case PluginFieldType::kINT64: return static_cast<int32_t>(read<int64_t>(field));
    default: throw Refused(std::string("field `") + field.name + "` has a type that no attribute has", EXPORT_AGAIN);
  }
}

Attributes attributes_of(const Operator& made, const PluginFieldCollection& given) {
  std::map<std::string, Value> found;
  for (int32_t i = 0; i < given.nbFields; i++)
    for (const auto& [name, empty] : made.fields)
      if (name == given.fields[i].name) found[name] = value_of(given.fields[i]);
  for (const auto& [name, empty] : made.fields) {
    const auto one = found.find(name);
    if (one == found.end()) throw Refused("vl2::" + made.name + " has no attribute `" + name + "`", EXPORT_AGAIN);
    if (one->second.index() != empty.index()) {
      const char* kinds[] = {"int", "float", "str"};
      throw Refused("`" + name + "` of vl2::" + made.name + " is a " + kinds[one->second.index()] + ", expected " +
                    kinds[empty.index()], EXPORT_AGAIN);
    }
  }
  return {found};
}

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  Plugin(const Operator& made, Attributes given) : made_(made), given_(std::move(given)), inputs_(made.inputs(given_)) {
    for (const auto& [name, empty] : made_.fields) fields_.push_back(field_of(name, given_.values.at(name)));
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType kind) noexcept override {
    switch (kind) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(made_, given_); });
  }

  const char* getPluginName() const noexcept override { return made_.name.c_str(); }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(made_.outputs.size()); }

  int32_t getOutputDataTypes(DataType* outputs, int32_t count, const DataType* inputs,
                             int32_t given) const noexcept override {
    return guarded(1, [&] {
      std::vector<std::string> types;
      for (int32_t i = 0; i < given; i++) types.push_back(name_of(inputs[i]));
      made_.check_types(given_, types);
      for (int32_t i = 0; i < count; i++) outputs[i] = DataType::kHALF;
      return 0;
    });
  }

  int32_t getOutputShapes(const DimsExprs* inputs, int32_t, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t count, IExprBuilder& builder) noexcept override {
    return guarded(1, [&] {
      for (int32_t i = 0; i < count; i++) {
        const Output& output = made_.outputs[i];
        outputs[i] = inputs[input(output.like)];
        if (!output.last.empty()) outputs[i].d[outputs[i].nbDims - 1] = builder.constant(given_.integer(output.last));
      }
      return 0;
    });
  }

  int32_t getAliasedInput(int32_t output) noexcept override {
    return guarded(-1, [&] { return made_.outputs.at(output).in_place ? input(made_.outputs[output].like) : -1; });
  }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* described, int32_t inputs,
                                 int32_t) noexcept override {
    const PluginTensorDesc& one = described[position].desc;
    const DataType expected = position < inputs ? data_type(inputs_[position].type) : DataType::kHALF;
    return one.format == TensorFormat::kLINEAR && one.type == expected;
  }

  // Here, not in getWorkspaceSize, what no kernel covers can end a build.
  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return guarded(1, [&] {
      workspace(inputs, count);
      return 0;
    });
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return guarded<size_t>(0, [&] { return static_cast<size_t>(workspace(inputs, count)); });
  }

  int32_t setTactic(int32_t) noexcept override { return 0; }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }

  // TensorRT-RTX attaches plugins while it builds, where there need be no GPU: kernels are loaded by the first run.
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

  int32_t enqueue(const PluginTensorDesc* described, const PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    return guarded(1, [&] {
      std::vector<Shape> sides;
      for (size_t i = 0; i < inputs_.size(); i++) sides.push_back(shape_of(described[i].dims));
      if (sides != sides_) {
        plan_ = made_.plan(given_, named(sides));
        sides_ = sides;
      }
      std::map<std::string, void*> buffers;
      for (size_t i = 0; i < inputs_.size(); i++) buffers[inputs_[i].name] = const_cast<void*>(inputs[i]);
      for (size_t i = 0; i < made_.outputs.size(); i++) buffers[made_.outputs[i].name] = outputs[i];
      Kernels::current().run(plan_, std::move(buffers), workspace, stream);
      return 0;
    });
  }

 private:
  int32_t input(const std::string& name) const {
    for (size_t i = 0; i < inputs_.size(); i++)
      if (inputs_[i].name == name) return static_cast<int32_t>(i);
    throw std::logic_error("vl2::" + made_.name + " has no input " + name);
  }

  Shapes named(const std::vector<Shape>& sides) const {
    Shapes shapes;
    for (size_t i = 0; i < inputs_.size(); i++) shapes[inputs_[i].name] = sides[i];
    return shapes;
  }

  int64_t workspace(const DynamicPluginTensorDesc* inputs, int32_t count) const {
    std::vector<Shape> low, high;
    for (int32_t i = 0; i < count; i++) {
      low.push_back(shape_of(inputs[i].min));
      high.push_back(shape_of(inputs[i].max));
    }
    return largest_workspace(made_, given_, low, high);
  }

  const Operator& made_;
  const Attributes given_;
  const std::vector<Tensor> inputs_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
  // of the shapes that were run last; a context has a plugin of its own
  std::vector<Shape> sides_;
  Plan plan_;
};

class Creator : public IPluginCreatorV3One {
 public:
  explicit Creator(const Operator& made) : made_(made) {
    for (const auto& [name, empty] : made_.fields) fields_.push_back(field_of(name, empty));
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(made_, attributes_of(made_, *given)); });
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return made_.name.c_str(); }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return NAMESPACE; }

 private:
  const Operator& made_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

}  // namespace
}  // namespace vl2

#define VL2_EXPORT extern "C" __attribute__((visibility("default")))

// The two functions that TensorRT looks for in a plugin library.
VL2_EXPORT void setLoggerFinder(ILoggerFinder* finder) { vl2::finder = finder; }

VL2_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static std::vector<vl2::Creator> creators(vl2::operators().begin(), vl2::operators().end());
  static std::vector<IPluginCreatorInterface*> pointers = [] {
    std::vector<IPluginCreatorInterface*> all;
    for (vl2::Creator& creator : creators) all.push_back(&creator);
    return all;
  }();
  count = static_cast<int32_t>(pointers.size());
  return pointers.data();
}

// Why a call failed, and how to mend it in the next line; empty where none has.
VL2_EXPORT const char* vl2_plugin_error() { return vl2::told.c_str(); }

// What a bundle's manifest has as `kernels` of the engines that this library runs.
VL2_EXPORT const char* vl2_plugin_hash() { return VL2_PLUGIN_HASH; }
