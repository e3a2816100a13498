// Stands for libcuda.so.1 in test_host.py: it says what it is asked to do to the function that the test has set.
#include <stdlib.h>
#include <string.h>

typedef int (*Launched)(const char* kernel, const unsigned* sizes, int allowed, void* stream, void** parameters);
struct Function { char name[64]; int allowed; };

Launched launched;
int major = 8, minor = 6, without_context;
const void* loaded_image;

int cuCtxGetCurrent(void** context) { return *context = without_context ? 0 : &launched, 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? major : attribute == 76 ? minor : -1;
  return device;
}
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)(loaded_image = image), 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  struct Function* made = calloc(1, sizeof *made);
  if (module != loaded_image || strlen(name) >= sizeof made->name) return 500;
  strcpy(made->name, name);
  made->allowed = 48 << 10;
  return *function = made, 0;
}
int cuFuncSetAttribute(struct Function* function, int attribute, int value) {
  if (attribute != 8) return 1;
  return function->allowed = value, 0;
}
int cuLaunchKernel(struct Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  const unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
  return extra ? 1 : launched(function->name, sizes, function->allowed, stream, parameters);
}
