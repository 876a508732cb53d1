// The GPU's memory: a range of addresses of its own, which the host may not touch. None is used twice, so that what was
// freed is known for ever.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

#include "driver.h"

namespace emu {

constexpr size_t kRange = size_t(1) << 40, kPage = 4096;

struct Allocation {
  size_t bytes;
  bool freed;
};
static std::map<uint64_t, Allocation>& every = *new std::map<uint64_t, Allocation>;  // of the GPU, also freed ones
static std::map<uint64_t, size_t>& pinned = *new std::map<uint64_t, size_t>;
static std::vector<uint64_t>& live = *new std::vector<uint64_t>;
static bool stale = true;  // `live` is
static char *base, *top;
static size_t in_use;
static int opened;
static struct sigaction before;

static size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
static bool on_gpu(const void* p) { return base && p >= base && p < base + kRange; }

// The host reads or writes memory of the GPU: the program ends as with a real one, but says why.
static void touched(int number, siginfo_t* info, void*) {
  if (on_gpu(info->si_addr)) {
    char text[256] = "the host touches memory of the GPU: ";
    size_t length = strlen(text);
    describe(info->si_addr, text + length, sizeof text - length - 1);
    strcat(text, "\n");
    if (write(2, text, strlen(text)) < 0) _exit(1);
  }
  sigaction(number, &before, nullptr);  // the access is tried again, and meets who was there before
}

static bool reserve() {
  if (base) return true;
  void* at = mmap(nullptr, kRange, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return false;
  madvise(at, kRange, MADV_DONTDUMP);  // a core dump would take minutes to look through it
  base = top = (char*)at;
  struct sigaction action {};
  action.sa_sigaction = touched;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before);
  return true;
}

Opened::Opened() {
  if (!opened++ && top > base) mprotect(base, size_t(top - base), PROT_READ | PROT_WRITE);
}
Opened::~Opened() {
  if (!--opened && top > base) mprotect(base, size_t(top - base), PROT_NONE);
}

Error allocate(void** at, size_t bytes) {
  if (!reserve()) return refuse(kOutOfMemory, "the host gives no range of addresses for the GPU's memory");
  *at = nullptr;
  if (!bytes) return kSuccess;
  size_t room = pages(bytes) + kPage;  // a page between neighbours
  if (in_use + bytes > device.memory || top + room > base + kRange)
    return refuse(kOutOfMemory, std::to_string(bytes) + " bytes do not fit: " + std::to_string(in_use) + " of " +
                                    std::to_string(device.memory) + " are in use");
  *at = top;
  top += room;
  in_use += bytes;
  every[uint64_t(*at)] = {bytes, false};
  stale = true;
  Opened access;
  memset(*at, 0xff, bytes);  // NaN in every type
  return kSuccess;
}

Error release(void* at) {
  if (!at) return kSuccess;
  auto found = every.find(uint64_t(at));
  if (found == every.end() || found->second.freed) return refuse(kInvalidValue, "cudaFree of " + describe(at));
  found->second.freed = true;
  in_use -= found->second.bytes;
  stale = true;
  madvise(at, pages(found->second.bytes), MADV_DONTNEED);
  emu_forget(at, pages(found->second.bytes));
  return kSuccess;
}

Error allocate_pinned(void** at, size_t bytes) {
  *at = bytes ? aligned_alloc(kPage, pages(bytes)) : nullptr;
  if (!bytes) return kSuccess;
  if (!*at) return refuse(kOutOfMemory, "no pinned memory left");
  memset(*at, 0xff, bytes);
  pinned[uint64_t(*at)] = bytes;
  return kSuccess;
}

Error release_pinned(void* at) {
  if (!at) return kSuccess;
  if (!pinned.erase(uint64_t(at))) return refuse(kInvalidValue, "cudaFreeHost of what cudaMallocHost did not give");
  free(at);
  return kSuccess;
}

size_t allocated() { return in_use; }

// The last entry that begins at or before an address.
template <class Value>
static auto entry(std::map<uint64_t, Value>& map, const void* pointer) {
  auto next = map.upper_bound(uint64_t(pointer));
  return next == map.begin() ? map.end() : std::prev(next);
}

Place place(const void* pointer) {
  if (on_gpu(pointer)) return Place::gpu;
  auto found = entry(pinned, pointer);
  return found != pinned.end() && uint64_t(pointer) < found->first + found->second ? Place::pinned : Place::pageable;
}

bool within_allocation(const void* pointer, size_t bytes) {
  uint64_t end = uint64_t(pointer) + bytes;
  if (on_gpu(pointer)) {
    auto found = entry(every, pointer);
    return found != every.end() && !found->second.freed && end <= found->first + found->second.bytes;
  }
  auto found = entry(pinned, pointer);
  return found == pinned.end() || uint64_t(pointer) >= found->first + found->second ||
         end <= found->first + found->second;
}

void describe(const void* pointer, char* text, size_t bytes) {
  if (!on_gpu(pointer)) {
    const char* whose = !pointer ? "nobody's" : place(pointer) == Place::pinned ? "the host's, pinned" : "the host's";
    snprintf(text, bytes, "%p, which is %s", pointer, whose);
    return;
  }
  auto found = entry(every, pointer);
  if (found == every.end()) snprintf(text, bytes, "%p, which was never allocated", pointer);
  else
    snprintf(text, bytes, "byte %llu of an allocation of %zu%s", (unsigned long long)(uint64_t(pointer) - found->first),
             found->second.bytes, found->second.freed ? ", which was freed" : "");
}

std::string describe(const void* pointer) {
  char text[160];
  describe(pointer, text, sizeof text);
  return text;
}

const std::vector<uint64_t>& allocations() {
  if (stale) {
    live.clear();
    for (const auto& [at, allocation] : every)
      if (!allocation.freed) live.push_back(at), live.push_back(allocation.bytes);
    if (live.empty()) live = {0, 0};  // a kernel may then touch none
    stale = false;
  }
  return live;
}

}  // namespace emu
