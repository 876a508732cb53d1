// Judges every access to memory. The compiler puts a call before each load and store of a kernel (-fsanitize=thread,
// whose functions are defined here), and instructions that touch memory report it themselves.
//
// Two accesses to a byte, one of them a write, must be ordered: by a barrier of the block, by __syncwarp of a mask with
// both lanes, or by being one thread's. Blocks of a launch are never ordered, but for atomics. Of what lanes of a warp do
// together (ldmatrix, wmma) nobody knows which lane touches what: it is ordered with none of them.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cells.h"

namespace emu {

uint32_t now = 1, block_began, barrier;
static uint32_t launch_began;
static uint32_t warp_met[32], lanes_met[32][32][32];
static bool lanes_differ[32];

Cell* shared_cells;
constexpr size_t kPage = 4096;
static std::unordered_map<uint64_t, Cell*> pages;
static uint64_t last_page;
static Cell* last_cells;

static std::vector<std::pair<uint64_t, uint64_t>> buffers;  // beginning and end, in order
static size_t last_buffer;

static Cell* reserve_cells(size_t count) {
  return (Cell*)mmap(nullptr, count * sizeof(Cell), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void new_launch() {
  if (!shared_cells) shared_cells = reserve_cells(kShared);
  launch_began = ++now;
  buffers.clear();
  last_buffer = 0;
  const EmuLaunch& launch = *block.launch;
  for (int i = 0; i < launch.buffer_count; ++i)
    buffers.push_back({launch.buffers[2 * i], launch.buffers[2 * i] + launch.buffers[2 * i + 1]});
  std::sort(buffers.begin(), buffers.end());
}

void new_block() {
  block_began = barrier = ++now;
  for (int warp = 0; warp < 32; ++warp) {
    warp_met[warp] = now;
    if (lanes_differ[warp]) memset(lanes_met[warp], 0, sizeof lanes_met[warp]), lanes_differ[warp] = false;
  }
}

void block_ordered() { barrier = ++now; }

void warp_ordered(int warp, uint32_t mask) {
  ++now;
  if (mask == ~0u) {
    warp_met[warp] = now;
    return;
  }
  lanes_differ[warp] = true;
  for (int a = 0; a < 32; ++a)
    for (int b = 0; b < 32; ++b)
      if (mask >> a & mask >> b & 1) lanes_met[warp][a][b] = now;
}

static int warp_of(uint16_t who) { return who & kLanes ? who & 31 : (who & kThread) / kWarp; }

bool before(uint32_t time, uint16_t who, uint16_t me, uint32_t began) {
  if (time < began) return true;
  if (time < block_began) return false;
  if (time < barrier) return true;
  if (who & kMany) return false;
  if (!((who | me) & kLanes) && (who & kThread) == me) return true;
  if (warp_of(who) != warp_of(me)) return false;
  if (time < warp_met[warp_of(me)]) return true;
  return !((who | me) & kLanes) && time < lanes_met[me / kWarp][(who & kThread) % kWarp][me % kWarp];
}

std::string actor(uint16_t who, uint32_t time) {
  if (time < block_began) return "a thread of another block";
  if (who & kMany) return "several threads";
  if (who & kBulk) return "a bulk copy";
  if (who & kLanes) return "lanes of warp " + std::to_string(who & 31);
  return name_of(threads[who & kThread]);
}

std::string place_of(const void* pointer) {
  char text[160];
  size_t offset = size_t((const char*)pointer - block.shared);
  if (offset < kShared) {
    for (const auto& array : block.arrays)
      if (offset >= array.offset && offset < array.offset + array.bytes) {
        snprintf(text, sizeof text, "byte %zu of %s", offset - array.offset, array.name.c_str());
        return text;
      }
    return "shared memory outside of all arrays";
  }
  if (block.launch->describe) return block.launch->describe(pointer, text, sizeof text), text;
  for (int i = 0; i < block.launch->buffer_count; ++i) {
    uint64_t base = block.launch->buffers[2 * i], bytes = block.launch->buffers[2 * i + 1];
    int64_t from = int64_t(uint64_t(pointer) - base);
    if (from < -4096 || from >= int64_t(bytes) + 4096) continue;
    snprintf(text, sizeof text, "byte %lld of buffer %d, which has %llu", (long long)from, i,
             (unsigned long long)bytes);
    return text;
  }
  snprintf(text, sizeof text, "%p, which is in no buffer", pointer);
  return text;
}

static const char* verb(Kind kind) {
  return kind == Kind::read ? " reads " : kind == Kind::write ? " writes " : kind == Kind::atomic ? " updates "
                                                                                                  : " copies to ";
}

[[noreturn]] static void refuse(uint16_t me, Kind kind, const void* at, const std::string& reason, const void* pc) {
  std::string who = me & kLanes ? actor(me, now) : name_of(*block.self);
  fail(who + verb(kind) + place_of(at) + reason, pc);
}

static void judge(Cell& cell, Kind kind, uint16_t me, const void* at, bool shared, const void* pc) {
  if (kind == Kind::read && cell.read == now && cell.reader == me) return;  // again, and nobody has written since
  uint32_t began = shared ? block_began : launch_began;
  if (cell.writer & kPending && cell.wrote >= block_began)
    refuse(me, kind, at, ", where an asynchronous copy of " + actor(cell.writer, cell.wrote) + " is under way", pc);
  if (cell.writer & kBulk && cell.wrote >= block_began) {
    if (!saw_bulk(cell.writer, cell.wrote, me))
      refuse(me, kind, at, ", where a bulk copy arrived whose phase was not waited for", pc);
  } else if (!(kind == Kind::atomic && cell.writer & kAtomic) && !before(cell.wrote, cell.writer, me, began)) {
    refuse(me, kind, at, ", which " + actor(cell.writer, cell.wrote) + " wrote, with nothing in between that orders them", pc);
  }
  if (kind == Kind::read) {
    if (shared && cell.wrote < block_began) refuse(me, kind, at, ", which was never written", pc);
    bool fresh = cell.read < began;
    if (fresh) cell.first_read = now;
    if (fresh || before(cell.read, cell.reader, me, began)) cell.reader = me;
    else if (cell.reader != me && !(cell.reader & kMany))
      cell.reader = warp_of(cell.reader) == warp_of(me) && cell.read >= block_began ? kLanes | warp_of(me) : kMany;
    cell.read = now;
    return;
  }
  if (cell.read >= began) {
    if (cell.first_read < block_began)
      refuse(me, kind, at, ", which a thread of another block reads", pc);
    if (!before(cell.read, cell.reader, me, began))
      refuse(me, kind, at, ", which " + actor(cell.reader, cell.read) + " read, with nothing in between that orders them",
             pc);
  }
  cell.read = 0;
  cell.wrote = now;
  cell.writer = uint16_t(me | (kind == Kind::atomic ? kAtomic : kind == Kind::issue ? kPending : 0));
}

static bool in_some_array(size_t offset, size_t bytes) {
  for (const auto& array : block.arrays)
    if (offset >= array.offset && offset + bytes <= array.offset + array.bytes) return true;
  return false;
}

static bool in_some_buffer(uint64_t address, size_t bytes) {
  auto inside = [&](size_t i) { return address >= buffers[i].first && address + bytes <= buffers[i].second; };
  if (inside(last_buffer)) return true;
  auto next = std::upper_bound(buffers.begin(), buffers.end(), std::pair{address, ~uint64_t(0)});
  if (next == buffers.begin()) return false;
  last_buffer = size_t(next - buffers.begin() - 1);
  return inside(last_buffer);
}

// Constant tables of a kernel lie in its library.
static bool in_library(const void* pointer) {
  Dl_info kernel, info;
  return dladdr((const void*)block.launch->entry, &kernel) && dladdr(pointer, &info) &&
         info.dli_fbase == kernel.dli_fbase;
}

static Cell* cells_of(uint64_t page) {
  if (page != last_page || !last_cells) {
    Cell*& cells = pages[page];
    if (!cells) cells = (Cell*)calloc(kPage, sizeof(Cell));
    last_page = page, last_cells = cells;
  }
  return last_cells;
}

void access(const void* pointer, size_t bytes, Kind kind, uint16_t me, const void* pc) {
  size_t offset = size_t((const char*)pointer - block.shared);
  if (offset < kShared) {
    if (!in_some_array(offset, bytes)) refuse(me, kind, pointer, "", pc);
    trace(pc, offset, bytes, kind != Kind::read);
    for (size_t i = 0; i < bytes; ++i) judge(shared_cells[offset + i], kind, me, (const char*)pointer + i, true, pc);
    return;
  }
  uint64_t address = uint64_t(pointer);
  if (block.launch->buffer_count && !in_some_buffer(address, bytes)) {
    if (kind == Kind::read && in_library(pointer)) return;
    refuse(me, kind, pointer, "", pc);
  }
  for (size_t i = 0; i < bytes; ++i, ++address)
    judge(cells_of(address / kPage)[address % kPage], kind, me, (const char*)address, false, pc);
}

static bool on_stack(const void* pointer, const char* first, int count) {
  return size_t((const char*)pointer - first) < kStack * count;
}

static void of_thread(const void* pointer, size_t bytes, Kind kind, const void* pc) {
  if (!block.checking || on_stack(pointer, block.self->stack, 1)) return;
  if (on_stack(pointer, block.stacks, kMaxThreads))
    fail(name_of(*block.self) + verb(kind) + "memory beyond its own variables", pc);
  access(pointer, bytes, kind, uint16_t(block.self->id), pc);
}

static void of_warp(const void* pointer, size_t bytes, Kind kind) {
  if (on_stack(pointer, block.stacks, kMaxThreads)) return;
  access(pointer, bytes, kind, uint16_t(kLanes | block.self->id / kWarp), nullptr);
}

static void land(const Copy& copy) {
  uint16_t me = uint16_t(block.self->id);
  if (copy.from_bytes) access(copy.from, copy.from_bytes, Kind::read, me, nullptr);
  memcpy(copy.to, copy.from, copy.from_bytes);
  memset(copy.to + copy.from_bytes, 0, copy.bytes - copy.from_bytes);
  for (int i = 0; i < copy.bytes; ++i) {
    Cell& cell = shared_cells[copy.to + i - block.shared];
    cell.wrote = now, cell.writer = me, cell.read = 0;
  }
}

}  // namespace emu

using namespace emu;

extern "C" {

void emu_forget(void* at, size_t bytes) {
  last_cells = nullptr;
  for (uint64_t page = uint64_t(at) / kPage; page * kPage < uint64_t(at) + bytes; ++page) {
    auto found = pages.find(page);
    if (found == pages.end()) continue;
    free(found->second);
    pages.erase(found);
  }
}

void emu_reads(const void* pointer, size_t bytes) {
  of_thread(pointer, bytes, Kind::read, __builtin_return_address(0));
}
void emu_writes(void* pointer, size_t bytes) { of_thread(pointer, bytes, Kind::write, __builtin_return_address(0)); }
void emu_atomic(void* pointer, size_t bytes) { of_thread(pointer, bytes, Kind::atomic, __builtin_return_address(0)); }
void emu_warp_reads(const void* pointer, size_t bytes) { of_warp(pointer, bytes, Kind::read); }
void emu_warp_writes(void* pointer, size_t bytes) { of_warp(pointer, bytes, Kind::write); }

void emu_copy_async(uint32_t to, const void* from, int bytes, int from_bytes) {
  char* target = (char*)emu_shared_pointer(to, bytes);
  const void* pc = __builtin_return_address(0);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || from_bytes < 0 || from_bytes > bytes)
    fail("an asynchronous copy of " + std::to_string(from_bytes) + " to " + std::to_string(bytes) + " bytes", pc);
  if (to % bytes || (from_bytes && uint64_t(from) % bytes))
    fail(name_of(*block.self) + " copies asynchronously between addresses that are no multiples of " +
             std::to_string(bytes), pc);
  of_thread(target, bytes, Kind::issue, pc);
  if (from_bytes) of_thread(from, from_bytes, Kind::read, pc);
  block.self->uncommitted.push_back({target, (const char*)from, bytes, from_bytes});
}

void emu_fence() {}

void emu_commit_group() { block.self->groups.push_back(std::move(block.self->uncommitted)), block.self->uncommitted.clear(); }

void emu_wait_group(int newest_left) {
  auto& groups = block.self->groups;
  while (int(groups.size()) > newest_left) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}

void emu_wait_all() {
  emu_wait_group(0);
  for (const Copy& copy : block.self->uncommitted) land(copy);
  block.self->uncommitted.clear();
}

// The functions of -fsanitize=thread.
void __tsan_init() {}
#define EMU_TSAN(name, bytes, kind) \
  void __tsan_##name(void* p) { of_thread(p, bytes, Kind::kind, __builtin_return_address(0)); }
EMU_TSAN(read1, 1, read)
EMU_TSAN(read2, 2, read)
EMU_TSAN(read4, 4, read)
EMU_TSAN(read8, 8, read)
EMU_TSAN(read16, 16, read)
EMU_TSAN(write1, 1, write)
EMU_TSAN(write2, 2, write)
EMU_TSAN(write4, 4, write)
EMU_TSAN(write8, 8, write)
EMU_TSAN(write16, 16, write)
void __tsan_read_range(void* p, size_t bytes) { of_thread(p, bytes, Kind::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { of_thread(p, bytes, Kind::write, __builtin_return_address(0)); }

// Those of -fsanitize=bounds, alignment, integer-divide-by-zero.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
static std::string in_line(const SourceLocation* place) {
  return name_of(*block.self) + ", line " + std::to_string(place->line) + ": ";
}
void __ubsan_handle_out_of_bounds(SourceLocation* place, void* index) {
  if (block.self) fail(in_line(place) + "index " + std::to_string((long long)index) + " is outside of the array");
}
void __ubsan_handle_type_mismatch_v1(SourceLocation* place, void* pointer) {
  if (block.self) fail(in_line(place) + "misaligned access, or null: " + place_of(pointer));
}
void __ubsan_handle_divrem_overflow(SourceLocation* place, void*, void*) {
  if (block.self) fail(in_line(place) + "division by zero");
}
}
