// What the asynchronous proxy does: bulk copies that an mbarrier counts, and products of warpgroups (wgmma).
#pragma once
#include "emulator.h"

// One lane's operands of wgmma.mma_async: `d` are the addresses of its accumulators, `a` its four registers, or null.
struct EmuWgmma {
  void* const* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

extern "C" {
void emu_proxy_fence();
void emu_mbarrier_init_fence();
void emu_mbarrier_init(uint32_t address, uint32_t count);
void emu_mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes);
bool emu_mbarrier_try_wait(uint32_t address, uint32_t parity);
void emu_copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier);

void emu_wgmma(EmuWarp&);         // variant: emu_wgmma_variant
void emu_wgmma_fence(EmuWarp&);
void emu_wgmma_commit(EmuWarp&);
void emu_wgmma_wait(EmuWarp&);    // variant: how many of the newest groups may be in flight
}

constexpr int emu_wgmma_variant(int n, EmuType a, EmuType b, bool a_in_registers) {
  return n | int(a) << 12 | int(b) << 16 | int(a_in_registers) << 20;
}
