/* Fake library with the symbols of libcuda.so.1, for tests of dlopen and dlsym. */

#define ABSENT(name) \
    __attribute__((visibility("default"))) int name(void) { return 100; /* CUDA_ERROR_NO_DEVICE */ }

__attribute__((visibility("default"))) int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }

__attribute__((visibility("default"))) int cuDriverGetVersion(int *version) {
    *version = 13010;
    return 0;
}

__attribute__((visibility("default"))) int cuGetErrorName(int code, const char **name) {
    *name = code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR_UNKNOWN";
    return 0;
}

ABSENT(cuDeviceGet)
ABSENT(cuDeviceGetName)
ABSENT(cuDevicePrimaryCtxRetain)
ABSENT(cuDevicePrimaryCtxRelease_v2)
ABSENT(cuCtxSetCurrent)
ABSENT(cuMemGetInfo_v2)
ABSENT(cuStreamCreate)
ABSENT(cuStreamDestroy_v2)
ABSENT(cuStreamSynchronize)
ABSENT(cuStreamQuery)
ABSENT(cuEventCreate)
ABSENT(cuEventDestroy_v2)
ABSENT(cuEventRecord)
ABSENT(cuEventSynchronize)
ABSENT(cuGraphInstantiateWithFlags)
ABSENT(cuGraphLaunch)
ABSENT(cuGraphExecDestroy)
