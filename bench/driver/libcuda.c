// A libcuda that does nothing but count launches, of a machine with an H100: what Triton's
// launchers are run over where the host's time is measured and there is no GPU (bench/gpu/host.py).

#define NOTHING(name) \
  int name() { return 0; }

typedef unsigned long long Address;

long launches;

int cuLaunchKernelEx() {
  ++launches;
  return 0;
}

int cuPointerGetAttribute(Address* result, int attribute, Address pointer) {
  *result = pointer;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}

int cuDeviceGetAttribute(int* result, int attribute, int device) {
  const int processors = 16, shared_memory = 97;
  *result = attribute == processors ? 132 : attribute == shared_memory ? 232448 : 0;
  return 0;
}

int cuFuncGetAttribute(int* result, int attribute, void* function) {
  const int threads = 0;
  *result = attribute == threads ? 1024 : 0;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)1;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = "";
  return 0;
}

NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuMemAlloc_v2)
NOTHING(cuModuleLoadData)
NOTHING(cuOccupancyMaxActiveClusters)
