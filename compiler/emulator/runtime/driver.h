// The emulated GPU's driver: what libcuda.so.1 and libcudart.so.13 have in common. Calls come under `one_call`.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "driver_abi.h"

#define EMU_API extern "C" __attribute__((visibility("default")))

namespace emu {

// driver_device.cpp: the GPU, and what went wrong on it.
struct Device {
  std::string name = "emulated GPU";
  int major = 8, minor = 0, multiprocessors = 0, shared_opt_in = 0, shared_per_multiprocessor = 0, l2_bytes = 0;
  size_t memory = 0;
  uint64_t seed = 0;
};
extern Device device;
extern std::recursive_mutex one_call;

bool attribute(int number, int* value);
Error refuse(Error code, const std::string& what);  // a call fails, and says why
void fault(Error code, const std::string& what);    // work on the GPU failed: so do all later calls
Error faulted();                                    // the code of that; kSuccess
const std::string& last_message();

// driver_memory.cpp
enum class Place { gpu, pinned, pageable };
Error allocate(void** at, size_t bytes);
Error release(void* at);
Error allocate_pinned(void** at, size_t bytes);
Error release_pinned(void* at);
size_t allocated();
Place place(const void* pointer);
// Does what begins in memory of the GPU, or pinned memory, end in the same allocation?
bool within_allocation(const void* pointer, size_t bytes);
void describe(const void* pointer, char* text, size_t bytes);  // what an address is, in words
std::string describe(const void* pointer);
const std::vector<uint64_t>& allocations();  // pairs of address and bytes
// While one lives, this process may touch the GPU's memory.
struct Opened {
  Opened();
  ~Opened();
};

// driver_streams.cpp: work in the order of its streams, done no earlier than somebody waits for it.
struct Stream;
struct Event;
struct Graph;
using Work = std::function<void()>;
using Task = std::function<Work()>;  // called when it is issued, by every launch of a graph anew

Error issue(void* stream, Task task);
Error wait(void* stream);
Error wait_all();
void finish();     // all that was issued, beside captures
void drop_work();  // what nobody has waited for is never done
Error unsafe(const char* call);  // refused while a stream is captured in a mode other than relaxed
Error stream_create(void** stream, bool blocking);
Error stream_destroy(void* stream);
Error stream_query(void* stream);
Error stream_capturing(void* stream, int* status);
Error capture_begin(void* stream, int mode);
Error capture_end(void* stream, void** graph);
Error graph_instantiate(void** executable, void* graph);
Error graph_launch(void* executable, void* stream);
Error graph_destroy(void* graph);  // or an executable
Error event_create(void** event);
Error event_destroy(void* event);
Error event_record(void* event, void* stream);
Error event_wait(void* event);
Error event_query(void* event);
Error event_elapsed(float* milliseconds, void* begin, void* end);
Error stream_wait_event(void* stream, void* event);

// driver_copies.cpp
Error copy(void* to, const void* from, size_t bytes, int kind, void* stream);
Error fill(void* at, int value, size_t bytes, void* stream);

// driver_modules.cpp
Error load_module(void** module, const void* image);
Error unload_module(void* module);
Error find_function(void** function, void* module, const char* name);
Error set_dynamic_limit(void* function, int bytes);
Error launch(const LaunchConfig& config, void* function, void** arguments);

}  // namespace emu
