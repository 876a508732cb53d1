// libcuda.so.1: the driver's interface.
#include <cstring>

#include "driver.h"

using namespace emu;

#define ONE_CALL std::lock_guard<std::recursive_mutex> call(one_call)

EMU_API int cuInit(unsigned) { return kSuccess; }
EMU_API int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
EMU_API int cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
EMU_API int cuDeviceGet(int* handle, int ordinal) { return *handle = ordinal, ordinal ? kInvalidDevice : kSuccess; }

EMU_API int cuDeviceGetName(char* name, int bytes, int) {
  strncpy(name, device.name.c_str(), size_t(bytes));
  return kSuccess;
}
EMU_API int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = device.memory, kSuccess; }
EMU_API int cuDeviceGetAttribute(int* value, int number, int) {
  ONE_CALL;
  return attribute(number, value) ? kSuccess : refuse(kInvalidValue, "attribute " + std::to_string(number));
}

EMU_API int cuGetErrorName(int code, const char** name) {
  switch (code) {
    case kSuccess: *name = "CUDA_SUCCESS"; break;
    case kInvalidValue: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case kOutOfMemory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case kInvalidDirection: *name = "cudaErrorInvalidMemcpyDirection"; break;
    case kInvalidDevice: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case kInvalidImage: *name = "CUDA_ERROR_INVALID_IMAGE"; break;
    case kNoBinaryForGpu: *name = "CUDA_ERROR_NO_BINARY_FOR_GPU"; break;
    case kInvalidSource: *name = "CUDA_ERROR_INVALID_SOURCE"; break;
    case kInvalidHandle: *name = "CUDA_ERROR_INVALID_HANDLE"; break;
    case kIllegalState: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case kNotFound: *name = "CUDA_ERROR_NOT_FOUND"; break;
    case kNotReady: *name = "CUDA_ERROR_NOT_READY"; break;
    case kIllegalAddress: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case kOutOfResources: *name = "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"; break;
    case kLaunchFailure: *name = "CUDA_ERROR_LAUNCH_FAILED"; break;
    case kNotSupported: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    case kCaptureUnsupported: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case kCaptureInvalidated: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    case kCaptureImplicit: *name = "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"; break;
    default: *name = "CUDA_ERROR_UNKNOWN";
  }
  return kSuccess;
}
// The reason, which a real driver does not tell.
EMU_API int cuGetErrorString(int code, const char** text) {
  *text = code && !last_message().empty() ? last_message().c_str() : "";
  return kSuccess;
}

EMU_API int cuModuleLoadData(void** module, const void* image) {
  ONE_CALL;
  return load_module(module, image);
}
EMU_API int cuModuleUnload(void* module) {
  ONE_CALL;
  return unload_module(module);
}
EMU_API int cuModuleGetFunction(void** function, void* module, const char* name) {
  return find_function(function, module, name);
}
EMU_API int cuFuncSetAttribute(void* function, int attribute, int value) {
  ONE_CALL;
  constexpr int kMaxDynamicShared = 8;
  if (attribute != kMaxDynamicShared) return refuse(kNotSupported, "attribute " + std::to_string(attribute));
  return set_dynamic_limit(function, value);
}
EMU_API int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void**) {
  ONE_CALL;
  return launch(*config, function, arguments);
}
EMU_API int cuTensorMapEncodeTiled() { return refuse(kNotSupported, "tensor maps are not emulated"); }
