// libcudart.so.13: the runtime's interface.
#include "driver.h"

using namespace emu;

extern "C" int cuGetErrorName(int code, const char** name);
extern "C" int cuGetErrorString(int code, const char** text);

static thread_local int last_error;

// An error is also what cudaGetLastError gives, until it was asked.
static int told(int code) {
  if (code && code != kNotReady) last_error = code;
  return code;
}
#define CALL(expression)                                    \
  do {                                                      \
    std::lock_guard<std::recursive_mutex> call(one_call);   \
    return told(expression);                                \
  } while (false)
#define SAFE_CALL(name, expression)                         \
  do {                                                      \
    std::lock_guard<std::recursive_mutex> call(one_call);   \
    if (int code = unsafe(name)) return told(code);         \
    return told(expression);                                \
  } while (false)

EMU_API const char* cudaGetErrorName(int code) {
  const char* name;
  cuGetErrorName(code, &name);
  return name;
}
EMU_API const char* cudaGetErrorString(int code) {
  const char* text;
  cuGetErrorString(code, &text);
  return text;
}
EMU_API int cudaPeekAtLastError() { return faulted() ? faulted() : last_error; }
EMU_API int cudaGetLastError() {
  int code = cudaPeekAtLastError();
  last_error = kSuccess;
  return code;
}

EMU_API int cudaRuntimeGetVersion(int* version) { return *version = 13000, kSuccess; }
EMU_API int cudaDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
EMU_API int cudaGetDeviceCount(int* count) { return *count = 1, kSuccess; }
EMU_API int cudaGetDevice(int* ordinal) { return *ordinal = 0, kSuccess; }
EMU_API int cudaSetDevice(int ordinal) { return told(ordinal ? kInvalidDevice : kSuccess); }
EMU_API int cudaDeviceGetAttribute(int* value, int number, int) {
  CALL(attribute(number, value) ? kSuccess : refuse(kInvalidValue, "attribute " + std::to_string(number)));
}
EMU_API int cudaGetDeviceProperties(DeviceProp* out, int ordinal) {
  if (ordinal) return told(kInvalidDevice);
  *out = {};
  device.name.copy(out->name, sizeof out->name - 1);
  out->memory = device.memory;
  out->shared_per_block = 48 << 10;
  out->registers_per_block = out->registers_per_multiprocessor = 65536;
  out->warp = 32;
  out->threads_per_block = 1024;
  for (int i = 0; i < 3; ++i) attribute(2 + i, &out->block_size[i]), attribute(5 + i, &out->grid_size[i]);
  out->constant_memory = 64 << 10;
  out->major = device.major, out->minor = device.minor;
  out->multiprocessors = device.multiprocessors;
  out->can_map_host_memory = out->unified_addressing = out->copy_engines = out->concurrent_kernels = 1;
  out->l2_bytes = device.l2_bytes;
  out->threads_per_multiprocessor = 2048;
  out->shared_per_multiprocessor = size_t(device.shared_per_multiprocessor);
  out->shared_opt_in = size_t(device.shared_opt_in);
  out->blocks_per_multiprocessor = 32;
  return kSuccess;
}
EMU_API int cudaDeviceSynchronize() { CALL(wait_all()); }

EMU_API int cudaMemGetInfo(size_t* unused, size_t* whole) {
  *whole = device.memory, *unused = device.memory - allocated();
  return kSuccess;
}
EMU_API int cudaMalloc(void** at, size_t bytes) { SAFE_CALL("cudaMalloc", faulted() ? faulted() : allocate(at, bytes)); }
EMU_API int cudaMallocHost(void** at, size_t bytes) { SAFE_CALL("cudaMallocHost", allocate_pinned(at, bytes)); }
// Freeing waits for all work. It succeeds even where that failed: destructors must not.
EMU_API int cudaFree(void* at) { SAFE_CALL("cudaFree", (finish(), release(at))); }
EMU_API int cudaFreeHost(void* at) { SAFE_CALL("cudaFreeHost", release_pinned(at)); }
EMU_API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  CALL(copy(to, from, bytes, kind, stream));
}
EMU_API int cudaMemcpyPeerAsync(void* to, int to_gpu, const void* from, int from_gpu, size_t bytes, void* stream) {
  CALL(to_gpu || from_gpu ? kInvalidDevice : copy(to, from, bytes, 3, stream));
}
EMU_API int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  SAFE_CALL("cudaMemcpy", [&] {
    Error code = copy(to, from, bytes, kind, nullptr);
    return code ? code : wait(nullptr);
  }());
}
EMU_API int cudaMemsetAsync(void* at, int value, size_t bytes, void* stream) { CALL(fill(at, value, bytes, stream)); }

EMU_API int cudaStreamCreate(void** stream) { CALL(stream_create(stream, true)); }
EMU_API int cudaStreamCreateWithFlags(void** stream, unsigned flags) { CALL(stream_create(stream, !(flags & 1))); }
EMU_API int cudaStreamDestroy(void* stream) { CALL(stream_destroy(stream)); }
EMU_API int cudaStreamSynchronize(void* stream) { CALL(wait(stream)); }
EMU_API int cudaStreamQuery(void* stream) { CALL(stream_query(stream)); }
EMU_API int cudaStreamWaitEvent(void* stream, void* event, unsigned) { CALL(stream_wait_event(stream, event)); }
EMU_API int cudaStreamBeginCapture(void* stream, int mode) { CALL(capture_begin(stream, mode)); }
EMU_API int cudaStreamEndCapture(void* stream, void** graph) { CALL(capture_end(stream, graph)); }
EMU_API int cudaStreamIsCapturing(void* stream, int* status) { CALL(stream_capturing(stream, status)); }

EMU_API int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  CALL(graph_instantiate(executable, graph));
}
EMU_API int cudaGraphLaunch(void* executable, void* stream) { CALL(graph_launch(executable, stream)); }
EMU_API int cudaGraphDestroy(void* graph) { CALL(graph_destroy(graph)); }
EMU_API int cudaGraphExecDestroy(void* executable) { CALL(graph_destroy(executable)); }

EMU_API int cudaEventCreate(void** event) { CALL(event_create(event)); }
EMU_API int cudaEventCreateWithFlags(void** event, unsigned) { CALL(event_create(event)); }
EMU_API int cudaEventDestroy(void* event) { CALL(event_destroy(event)); }
EMU_API int cudaEventRecord(void* event, void* stream) { CALL(event_record(event, stream)); }
EMU_API int cudaEventSynchronize(void* event) { CALL(event_wait(event)); }
EMU_API int cudaEventQuery(void* event) { CALL(event_query(event)); }
EMU_API int cudaEventElapsedTime(float* milliseconds, void* begin, void* end) {
  CALL(event_elapsed(milliseconds, begin, end));
}
