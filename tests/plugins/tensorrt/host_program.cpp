// A program without Python that runs one plugin of a host library, for test_host_aarch64.py: host_driver.cpp in
// TensorRT's place, linked with fake_libcuda.c. It prints each launch: kernel, grid, block, shared memory, N, K, shift.
#include <cstdio>

#include "host_driver.cpp"

extern "C" int (*launched)(const char*, const unsigned*, int, void*, void**);

static int print(const char* kernel, const unsigned* sizes, int, void*, void** parameters) {
  std::printf("%s", kernel);
  for (int i = 0; i < 7; i++) std::printf(" %u", sizes[i]);
  // weight, scale, x, y, N, K, shift
  for (int i = 4; i < 7; i++) std::printf(" %d", *static_cast<int*>(parameters[i]));
  std::puts("");
  return 0;
}

int main(int count, char** words) {
  launched = print;
  void* library = count == 2 ? open_host(words[1]) : nullptr;
  if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  const int32_t rows = 64, columns = 128, group = 32;
  const PluginField fields[] = {{"N", &rows, PluginFieldType::kINT32, 1}, {"K", &columns, PluginFieldType::kINT32, 1},
                                {"scheme", "int4", PluginFieldType::kCHAR, 4},
                                {"group_size", &group, PluginFieldType::kINT32, 1}};
  IPluginV3* plugin = attached_plugin(library, "Linear", fields, 4);
  if (plugin == nullptr) return 2;
  const int64_t sides[27] = {3, 1, 2, columns};
  void *inputs[3] = {}, *outputs[1] = {};
  return enqueue(plugin, sides, inputs, 3, outputs, nullptr);
}
