// What the translator makes of wgmma instructions.
#pragma once
#include "async.h"
#include "cooperation.h"

namespace ptx {
EMU_FN void wgmma(int variant, void* const* d, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
                  bool accumulate) {
  EmuWgmma mine{d, a, a_descriptor, b_descriptor, accumulate};
  emu_collective(emu_wgmma, variant, ~0u, &mine);
}
EMU_FN void wgmma_fence() { emu_collective(emu_wgmma_fence, 0, ~0u, nullptr); }
EMU_FN void wgmma_commit() { emu_collective(emu_wgmma_commit, 0, ~0u, nullptr); }
EMU_FN void wgmma_wait(int newest_left) { emu_collective(emu_wgmma_wait, newest_left, ~0u, nullptr); }
}  // namespace ptx
