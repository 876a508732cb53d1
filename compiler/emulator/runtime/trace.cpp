// Writes down who reaches shared memory, and where, when asked to: what an address model counts bank conflicts from.
#include "state.h"

namespace emu {

struct Reached {
  const void* where;  // in the kernel's code; null for what lanes do together
  uint32_t block, thread, offset, bytes, writes;
};
static bool tracing;
static std::vector<Reached> reached;

void trace(const void* where, size_t offset, size_t bytes, bool writes) {
  if (!tracing) return;
  const EmuLaunch& launch = *block.launch;
  uint32_t number = block.index.x + launch.grid[0] * (block.index.y + launch.grid[1] * block.index.z);
  reached.push_back({where, number, uint32_t(block.self->id), uint32_t(offset), uint32_t(bytes), writes});
}

}  // namespace emu

extern "C" {

void emu_trace_begin() { emu::tracing = true, emu::reached.clear(); }

// The accesses since then, in their order; valid until the next trace begins.
const void* emu_trace_end(uint64_t* count) {
  emu::tracing = false;
  *count = emu::reached.size();
  return emu::reached.data();
}
}
