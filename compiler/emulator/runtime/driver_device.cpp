// The GPU: what it says of itself, and what went wrong on it.
#include "driver.h"

namespace emu {

Device device;
std::recursive_mutex one_call;

// Never destroyed: a program's last calls come while it ends.
static std::string& message = *new std::string;
static Error broken = kSuccess;

Error refuse(Error code, const std::string& what) {
  if (!broken) message = what;
  return code;
}

void fault(Error code, const std::string& what) {
  if (broken) return;
  message = what;
  broken = code;
}

Error faulted() { return broken; }
const std::string& last_message() { return message; }

bool attribute(int number, int* value) {
  switch (number) {  // CUdevice_attribute, cudaDeviceAttr
    case 1: case 2: case 3: *value = 1024; break;  // threads of a block, along x, along y
    case 4: *value = 64; break;
    case 5: *value = 2147483647; break;  // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 << 10; break;  // shared memory of a block
    case 9: *value = 64 << 10; break;  // constant memory
    case 10: *value = 32; break;       // threads of a warp
    case 12: case 82: *value = 65536; break;  // registers of a block, of a multiprocessor
    case 13: *value = 1410000; break;         // clock in kHz
    case 16: *value = device.multiprocessors; break;
    case 38: *value = device.l2_bytes; break;
    case 39: *value = 2048; break;  // threads of a multiprocessor
    case 41: *value = 1; break;     // one address space with the host
    case 75: *value = device.major; break;
    case 76: *value = device.minor; break;
    case 81: *value = device.shared_per_multiprocessor; break;
    case 97: *value = device.shared_opt_in; break;
    case 106: *value = 32; break;  // blocks of a multiprocessor
    default: return false;
  }
  return true;
}

}  // namespace emu

using namespace emu;

EMU_API void emu_driver_configure(int major, int minor, int multiprocessors, int shared_opt_in, int shared, int l2_bytes,
                                  uint64_t memory, uint64_t seed) {
  device.major = major, device.minor = minor, device.multiprocessors = multiprocessors;
  device.shared_opt_in = shared_opt_in, device.shared_per_multiprocessor = shared, device.l2_bytes = l2_bytes;
  device.memory = memory, device.seed = seed;
  device.name = "emulated GPU, sm_" + std::to_string(major) + std::to_string(minor);
}
EMU_API int emu_driver_fault() { return broken; }
EMU_API const char* emu_driver_message() { return message.c_str(); }
EMU_API void emu_driver_quiet() {
  if (!broken) message.clear();
}
EMU_API void emu_driver_forgive() {
  std::lock_guard<std::recursive_mutex> call(one_call);
  drop_work();
  broken = kSuccess;
  message.clear();
}
