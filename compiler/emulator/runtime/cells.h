// What is known of every byte of memory: who wrote and read it last, and when. memory.cpp judges by it.
#pragma once
#include "state.h"

namespace emu {

// Times of a clock that counts meetings, and who it was.
struct Cell {
  uint32_t wrote, read, first_read;
  uint16_t writer, reader;
};
// kBulk: the bulk copies that one mbarrier counts, whose number takes the thread's place.
constexpr uint16_t kAtomic = 0x8000, kPending = 0x4000, kLanes = 0x2000, kMany = 0x1000, kBulk = 0x0800,
                   kThread = 0x03ff;

enum class Kind { read, write, atomic, issue };  // issue: of an asynchronous copy, which may write from now on

extern uint32_t now, block_began, barrier;  // the present; when the block began; when all of its threads met last
extern Cell* shared_cells;

// Did what `who` did at `time` happen before what `me` does now? Both are threads, or kLanes and a warp. `began`: when the
// memory was, for all threads that can reach it.
bool before(uint32_t time, uint16_t who, uint16_t me, uint32_t began);
// Judges and notes an access of `me`.
void access(const void* pointer, size_t bytes, Kind kind, uint16_t me, const void* pc);
std::string actor(uint16_t who, uint32_t time);

// mbarrier.cpp
// Has `me` waited for the copies that landed at `time`?
bool saw_bulk(uint16_t who, uint32_t time, uint16_t me);
// Fails if the asynchronous proxy, told by `me`, does not see what threads wrote here: behind fence.proxy.async alone.
void demand_proxy_fence(const void* pointer, size_t bytes, uint16_t me);

}  // namespace emu
