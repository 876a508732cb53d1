// Copies between host and GPU, all of them asynchronous: they happen when their stream is waited for. What the host does
// meanwhile is found: results are rubbish until then, and sources must still be there, as they were.
#include <sys/uio.h>
#include <unistd.h>

#include <cstring>

#include "driver.h"

namespace emu {

enum { kHostToHost, kHostToGpu, kGpuToHost, kGpuToGpu, kByAddress };  // cudaMemcpyKind

static Error demand_within(const void* pointer, size_t bytes, const char* what) {
  if (within_allocation(pointer, bytes)) return kSuccess;
  return refuse(kInvalidValue, std::string(what) + " of " + std::to_string(bytes) + " bytes, at " + describe(pointer));
}

// The host may have freed its memory: a copy then fails, and not this process.
static bool read_host(void* to, const void* from, size_t bytes) {
  iovec mine{to, bytes}, other{const_cast<void*>(from), bytes};
  return process_vm_readv(getpid(), &mine, 1, &other, 1, 0) == ssize_t(bytes);
}
static bool write_host(void* to, const void* from, size_t bytes) {
  iovec mine{const_cast<void*>(from), bytes}, other{to, bytes};
  return process_vm_writev(getpid(), &mine, 1, &other, 1, 0) == ssize_t(bytes);
}

// Allocations may be freed between issue and work, or, in a graph, between capture and launch.
static bool still_there(const void* pointer, size_t bytes, Place was = Place::gpu) {
  if (place(pointer) == was && within_allocation(pointer, bytes)) return true;
  fault(kIllegalAddress, "a copy of " + std::to_string(bytes) + " bytes, at " + describe(pointer) +
                             (was == Place::pinned ? ", no longer pinned" : ""));
  return false;
}

static Work upload(void* to, const void* from, size_t bytes) {
  auto seen = std::make_shared<std::vector<char>>(bytes);
  if (!read_host(seen->data(), from, bytes)) memset(seen->data(), 0xff, bytes);  // told when it is done
  return [=, was = place(from)] {
    if (!still_there(to, bytes) || !still_there(from, bytes, was)) return;
    Opened access;
    if (!read_host(to, from, bytes)) return fault(kIllegalAddress, "the host freed the source of a copy under way");
    if (memcmp(to, seen->data(), bytes))
      fault(kLaunchFailure, "the host wrote to the source of a copy of " + std::to_string(bytes) + " bytes under way");
  };
}

static Work download(void* to, const void* from, size_t bytes) {
  std::vector<char> rubbish(bytes, char(0xff));
  write_host(to, rubbish.data(), bytes);
  return [=, was = place(to)] {
    if (!still_there(from, bytes) || !still_there(to, bytes, was)) return;
    Opened access;
    if (!write_host(to, from, bytes)) fault(kIllegalAddress, "the host freed the target of a copy under way");
  };
}

static Work between(void* to, const void* from, size_t bytes) {
  return [=] {
    if (!still_there(to, bytes) || !still_there(from, bytes)) return;
    Opened access;
    memmove(to, from, bytes);
  };
}

Error copy(void* to, const void* from, size_t bytes, int kind, void* stream) {
  if (!bytes) return faulted();
  bool to_gpu = place(to) == Place::gpu, from_gpu = place(from) == Place::gpu;
  int found = 2 * from_gpu + to_gpu;
  if (kind != kByAddress && kind != found)
    return refuse(kInvalidDirection, "a copy to " + describe(to) + " from " + describe(from) + " of the kind " +
                                         std::to_string(kind));
  if (Error code = demand_within(to, bytes, "a copy to memory")) return code;
  if (Error code = demand_within(from, bytes, "a copy from memory")) return code;
  int capturing = 0;
  if (stream && stream_capturing(stream, &capturing)) return kInvalidHandle;
  bool pageable = (!to_gpu && place(to) == Place::pageable) || (!from_gpu && place(from) == Place::pageable);
  if (capturing && pageable) {
    if (Error code = unsafe("a copy of memory that is not pinned")) return code;
    return refuse(kCaptureUnsupported, "a copy of memory that is not pinned while its stream is captured");
  }
  switch (found) {
    case kHostToHost:
      if (Error code = wait(stream)) return code;
      memmove(to, from, bytes);
      return kSuccess;
    case kHostToGpu: return issue(stream, [=] { return upload(to, from, bytes); });
    case kGpuToHost: return issue(stream, [=] { return download(to, from, bytes); });
    default:
      if ((const char*)to < (const char*)from + bytes && (const char*)from < (char*)to + bytes)
        return refuse(kInvalidValue, "a copy between ranges that overlap, at " + describe(to));
      return issue(stream, [=] { return between(to, from, bytes); });
  }
}

Error fill(void* at, int value, size_t bytes, void* stream) {
  if (!bytes) return faulted();
  if (place(at) != Place::gpu) return refuse(kInvalidValue, "cudaMemset of " + describe(at));
  if (Error code = demand_within(at, bytes, "cudaMemset")) return code;
  return issue(stream, [=]() -> Work {
    return [=] {
      if (!still_there(at, bytes)) return;
      Opened access;
      memset(at, value, bytes);
    };
  });
}

}  // namespace emu
