// What TensorRT does with a plugin library, for test_host.py: creates, describes, clones, attaches and runs a plugin.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

IPluginCreatorV3One* creator_of(void* library, const char* name) {
  using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
  int32_t count = 0;
  const auto* all = reinterpret_cast<Creators>(dlsym(library, "getCreators"))(count);
  for (int32_t i = 0; i < count; i++) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::string(one->getPluginName()) == name && std::string(one->getPluginNamespace()) == "vl2" &&
        std::string(one->getPluginVersion()) == "1")
      return one;
  }
  return nullptr;
}

template <class Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType kind) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(kind));
}

}  // namespace

extern "C" {

void* open_host(const char* path) { return dlopen(path, RTLD_NOW); }

// A plugin made as for an engine's execution, of another's serialized fields: build, serialize, create again, attach.
IPluginV3* attached_plugin(void* library, const char* name, const PluginField* fields, int32_t count) {
  auto* creator = creator_of(library, name);
  const PluginFieldCollection given{count, fields};
  auto* built = creator ? creator->createPlugin(name, &given, TensorRTPhase::kBUILD) : nullptr;
  if (built == nullptr) return nullptr;
  auto* kept = capability<IPluginV3OneRuntime>(built, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  auto* run = creator->createPlugin(name, kept, TensorRTPhase::kRUNTIME);
  delete built;
  auto* copy = run->clone();
  delete run;
  auto* attached = capability<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr);
  delete copy;
  return attached;
}

void forget(IPluginV3* plugin) { delete plugin; }

int32_t count_outputs(IPluginV3* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)->getNbOutputs();
}

int32_t aliased(IPluginV3* plugin, int32_t output) {
  return static_cast<IPluginV3OneBuildV2*>(capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD))
      ->getAliasedInput(output);
}

int32_t fields_of(IPluginV3* plugin, const PluginField** fields) {
  auto* kept = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  *fields = kept->fields;
  return kept->nbFields;
}

int32_t output_types(IPluginV3* plugin, int32_t* outputs, int32_t made, const int32_t* inputs, int32_t given) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
      ->getOutputDataTypes(reinterpret_cast<DataType*>(outputs), made, reinterpret_cast<const DataType*>(inputs),
                           given);
}

bool supports(IPluginV3* plugin, int32_t position, int32_t type, int32_t format, int32_t inputs) {
  std::vector<DynamicPluginTensorDesc> described(position + 1);
  described[position].desc.type = static_cast<DataType>(type);
  described[position].desc.format = static_cast<TensorFormat>(format);
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD)
      ->supportsFormatCombination(position, described.data(), inputs, 1);
}

// sides: of every input, eight numbers and the rank before them.
int32_t enqueue(IPluginV3* plugin, const int64_t* sides, void** inputs, int32_t count, void** outputs,
                void* workspace) {
  std::vector<PluginTensorDesc> described(count);
  for (int32_t i = 0; i < count; i++) {
    described[i].dims.nbDims = static_cast<int32_t>(sides[9 * i]);
    std::memcpy(described[i].dims.d, sides + 9 * i + 1, 8 * sizeof(int64_t));
  }
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)
      ->enqueue(described.data(), nullptr, inputs, outputs, workspace, reinterpret_cast<cudaStream_t>(7));
}
}
