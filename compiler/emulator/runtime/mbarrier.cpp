// The asynchronous proxy's copies: mbarriers, cp.async.bulk, and what makes threads' own writes known to that proxy.
//
// PTX ISA, "mbarrier": a phase is complete when as many arrivals as were asked for have come and no bytes are expected any
// more. Copies land as late as may be: where no thread of the block can go on without them. Who has waited for the phase
// sees them, and who met such a thread at a barrier of the block afterwards; nobody else does. Arrivals order nothing here.
#include <algorithm>
#include <cstring>
#include <map>

#include "../include/async.h"
#include "cells.h"

namespace emu {

struct Bulk {
  char* to;
  const char* from;
  uint32_t bytes;
};

struct Mbarrier {
  int number;
  uint32_t count, pending;
  int64_t expected = 0;  // bytes of this phase, less those of its copies
  uint64_t phase = 0;    // how many are complete
  std::vector<Bulk> copies;
  uint16_t maker;
  uint32_t made;                                  // when
  std::vector<uint32_t> waited;                   // when each thread last saw a phase complete
  uint32_t first_waited = 0;                      // since the last one
};

struct Wait {
  Mbarrier* mbarrier;
  uint32_t parity;
  bool refused;  // a try may fail although the phase comes: each first one does
};

static std::map<uint32_t, Mbarrier> mbarriers;  // by address
static std::vector<Mbarrier*> by_number;
static Wait waits[kMaxThreads];
static std::vector<uint32_t> proxy_fences[kMaxThreads], init_fences[kMaxThreads];  // when each thread came to one

void new_block_of_copies() {
  mbarriers.clear();
  by_number.clear();
  for (int id = 0; id < block.threads; ++id) proxy_fences[id].clear(), init_fences[id].clear(), waits[id] = {};
}

void end_block_of_copies() {
  for (const auto& [address, mbarrier] : mbarriers)
    if (!mbarrier.copies.empty()) fail("the block ends while a bulk copy is under way");
}

// Did `who` come to one of the fences after `time`, and did that happen before what `me` does now?
static bool fenced(const std::vector<uint32_t>& fences, uint32_t time, uint16_t who, uint16_t me) {
  auto first = std::upper_bound(fences.begin(), fences.end(), time);
  return first != fences.end() && before(*first, who, me, block_began);
}

void demand_proxy_fence(const void* pointer, size_t bytes, uint16_t me) {
  for (size_t i = 0; i < bytes; ++i) {
    const Cell& cell = shared_cells[(const char*)pointer + i - block.shared];
    if (cell.wrote < block_began || cell.writer & (kBulk | kPending)) continue;
    uint16_t who = cell.writer & kThread;
    if (cell.writer & kLanes || !fenced(proxy_fences[who], cell.wrote, who, me))
      fail("the asynchronous proxy touches " + place_of((const char*)pointer + i) + ", which " +
           actor(cell.writer, cell.wrote) + " wrote without a fence.proxy.async and a barrier behind it");
  }
}

bool saw_bulk(uint16_t who, uint32_t time, uint16_t me) {
  const Mbarrier& mbarrier = *by_number[who & kThread];
  if (mbarrier.first_waited >= time && mbarrier.first_waited < barrier) return true;
  if (!(me & kLanes)) return mbarrier.waited[me] >= time;
  auto first = mbarrier.waited.begin() + (me & 31) * kWarp;
  return std::all_of(first, first + kWarp, [&](uint32_t waited) { return waited >= time; });
}

static bool complete(const Mbarrier& mbarrier) { return mbarrier.pending == 0 && mbarrier.expected == 0; }

static void next_phase(Mbarrier& mbarrier) {
  ++now;
  for (const Bulk& copy : mbarrier.copies) {
    memcpy(copy.to, copy.from, copy.bytes);
    for (uint32_t i = 0; i < copy.bytes; ++i) {
      Cell& cell = shared_cells[copy.to + i - block.shared];
      cell.wrote = now, cell.writer = uint16_t(kBulk | mbarrier.number), cell.read = 0;
    }
  }
  mbarrier.copies.clear();
  mbarrier.pending = mbarrier.count;
  mbarrier.first_waited = 0;
  ++mbarrier.phase;
}

static bool passed(const Mbarrier& mbarrier, uint32_t parity) { return (mbarrier.phase & 1) != parity; }

bool resolve_mbarriers() {
  bool any = false;
  for (int id = 0; id < block.threads; ++id) {
    if (threads[id].state != State::at_mbarrier) continue;
    Wait& wait = waits[id];
    if (!passed(*wait.mbarrier, wait.parity) && complete(*wait.mbarrier)) next_phase(*wait.mbarrier);
    if (!passed(*wait.mbarrier, wait.parity)) continue;
    threads[id].state = State::ready;
    any = true;
  }
  return any;
}

static void* memory_of(uint32_t address) {
  void* memory = emu_shared_pointer(address, 8);
  if (address % 8) fail(name_of(*block.self) + " uses an mbarrier whose address is no multiple of 8");
  return memory;
}

// An mbarrier that this thread may use: its making is ordered before.
static Mbarrier& find(uint32_t address, const void* pc) {
  access(memory_of(address), 8, Kind::atomic, uint16_t(block.self->id), pc);
  auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail(name_of(*block.self) + " uses an mbarrier that was not initialised", pc);
  return found->second;
}

}  // namespace emu

using namespace emu;

extern "C" {

void emu_proxy_fence() { proxy_fences[block.self->id].push_back(++now); }

void emu_mbarrier_init_fence() { init_fences[block.self->id].push_back(++now); }

void emu_mbarrier_init(uint32_t address, uint32_t count) {
  access(memory_of(address), 8, Kind::write, uint16_t(block.self->id), __builtin_return_address(0));
  if (!count || count >> 20) fail("an mbarrier for " + std::to_string(count) + " arrivals");
  auto [found, fresh] = mbarriers.try_emplace(address);
  if (!fresh) fail("an mbarrier that is initialised twice");
  Mbarrier& mbarrier = found->second;
  mbarrier.number = int(by_number.size());
  mbarrier.count = mbarrier.pending = count;
  mbarrier.maker = uint16_t(block.self->id), mbarrier.made = now;
  mbarrier.waited.assign((block.threads + kWarp - 1) / kWarp * kWarp, 0);
  by_number.push_back(&mbarrier);
}

void emu_mbarrier_arrive(uint32_t address, uint32_t count, uint32_t expected_bytes) {
  Mbarrier& mbarrier = find(address, __builtin_return_address(0));
  if (complete(mbarrier)) next_phase(mbarrier);
  if (count > mbarrier.pending) fail("more arrivals at an mbarrier than it was initialised for", __builtin_return_address(0));
  mbarrier.expected += expected_bytes;
  mbarrier.pending -= count;
}

bool emu_mbarrier_try_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail("a parity that is neither 0 nor 1", __builtin_return_address(0));
  Mbarrier& mbarrier = find(address, __builtin_return_address(0));
  Wait& wait = waits[block.self->id];
  if (!passed(mbarrier, parity)) {
    wait.refused = !(wait.refused && wait.mbarrier == &mbarrier);
    wait.mbarrier = &mbarrier, wait.parity = parity;
    if (wait.refused) return false;
    block.self->state = State::at_mbarrier;
    yield();
  }
  mbarrier.waited[block.self->id] = now;
  if (!mbarrier.first_waited) mbarrier.first_waited = now;
  return true;
}

void emu_copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t address) {
  const void* pc = __builtin_return_address(0);
  uint16_t me = uint16_t(block.self->id);
  if (to % 16 || uint64_t(from) % 16 || bytes % 16 || !bytes)
    fail(name_of(*block.self) + " begins a bulk copy whose addresses and size are not all multiples of 16", pc);
  char* target = (char*)emu_shared_pointer(to, bytes);
  Mbarrier& mbarrier = find(address, pc);
  if (!fenced(init_fences[mbarrier.maker], mbarrier.made, mbarrier.maker, me) &&
      !fenced(proxy_fences[mbarrier.maker], mbarrier.made, mbarrier.maker, me))
    fail("a bulk copy counted by an mbarrier whose making no fence has made known", pc);
  demand_proxy_fence(target, bytes, me);
  access(target, bytes, Kind::issue, me, pc);
  access(from, bytes, Kind::read, me, pc);
  if (complete(mbarrier)) next_phase(mbarrier);
  mbarrier.expected -= bytes;
  mbarrier.copies.push_back({target, (const char*)from, bytes});
}
}
