// Threads of a block as fibers. One runs until it has to wait; then the scheduler picks another one in an order that the
// seed decides. Blocks run one after another, in such an order too.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>

#include "state.h"

namespace emu {

Block block;
Thread threads[kMaxThreads];
static std::mt19937_64 random_order;
static std::mutex one_launch;

std::string name_of(const Thread& thread) {
  char text[64];
  snprintf(text, sizeof text, "thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
  return text;
}

static std::string name_of_block() {
  char text[64];
  snprintf(text, sizeof text, "block (%u, %u, %u)", block.index.x, block.index.y, block.index.z);
  return text;
}

void fail(const std::string& what, const void* where) {
  char place[32] = "";
  if (where) snprintf(place, sizeof place, " [at %p]", where);
  block.error = std::string(block.launch->name) + ", " + name_of_block() + ": " + what + place;
  block.failed = true;
  _longjmp(block.scheduler, 1);
}

void yield() {
  if (_setjmp(block.self->resume) == 0) _longjmp(block.scheduler, 1);
}

static void fiber() {
  Thread& me = *block.self;
  for (;;) {
    block.launch->entry(block.launch->arguments);
    me.state = State::exited;
    yield();
  }
}

static void resume(Thread& thread) {
  block.self = &thread;
  if (_setjmp(block.scheduler) == 0) {
    block.checking = true;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber, 0);
    setcontext(&thread.start);
  }
  block.checking = false;
  block.self = nullptr;
}

// What the lanes of a warp that take part have waited for.
void run_collective(uint32_t lanes, int warp) {
  EmuWarp call{};
  call.lanes = lanes;
  Thread* first = nullptr;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    Thread& thread = threads[warp * kWarp + lane];
    call.operands[lane] = thread.operands;
    if (!first) first = &thread;
  }
  call.variant = first->variant;
  Thread* self = block.self;
  bool checking = block.checking;
  if (!self) block.self = first;  // for messages
  block.checking = false;
  if (first->collective) first->collective(call);
  else warp_ordered(warp, first->mask);
  block.self = self;
  block.checking = checking;
  for (int lane = 0; lane < kWarp; ++lane)
    if (lanes >> lane & 1) threads[warp * kWarp + lane].state = State::ready;
}

static uint32_t lanes_in(int warp, State state) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < block.threads; ++lane)
    if (threads[warp * kWarp + lane].state == state) lanes |= 1u << lane;
  return lanes;
}

// The lanes that the one asks for and that have not exited, if all have come for the same; else 0.
static uint32_t gathered(const Thread& one) {
  int warp = one.id / kWarp;
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarp && warp * kWarp + lane < block.threads; ++lane) {
    const Thread& other = threads[warp * kWarp + lane];
    if (!(one.mask >> lane & 1) || other.state == State::exited) continue;
    if (other.state != State::at_warp || other.collective != one.collective || other.variant != one.variant ||
        other.mask != one.mask)
      return 0;
    lanes |= 1u << lane;
  }
  return lanes;
}

static bool resolve_warps() {
  bool any = false;
  for (int id = 0; id < block.threads; ++id) {
    if (threads[id].state != State::at_warp) continue;
    if (uint32_t lanes = gathered(threads[id])) run_collective(lanes, id / kWarp), any = true;
  }
  if (any) return true;
  // Lanes that ask who is active: those that came to the same place while no other could go on.
  for (int id = 0; id < block.threads; ++id) {
    if (threads[id].state != State::at_active_mask) continue;
    uint32_t lanes = 0;
    int warp = id / kWarp * kWarp;
    for (int lane = 0; lane < kWarp && warp + lane < block.threads; ++lane)
      if (threads[warp + lane].state == State::at_active_mask && threads[warp + lane].line == threads[id].line)
        lanes |= 1u << lane;
    for (int lane = 0; lane < kWarp; ++lane)
      if (lanes >> lane & 1) threads[warp + lane].mask = lanes, threads[warp + lane].state = State::ready;
    any = true;
  }
  return any;
}

static void shuffle_priorities() {
  std::vector<uint32_t> warps(block.threads / kWarp + 1);
  for (auto& warp : warps) warp = uint32_t(random_order() & 0xfff) << 16;
  bool by_warps = random_order() & 1;  // a whole warp far ahead of the others, or all mixed
  for (int id = 0; id < block.threads; ++id)
    threads[id].priority = (by_warps ? warps[id / kWarp] : 0) + uint32_t(random_order() & 0xffff);
}

static std::string waiting_for(const Thread& thread) {
  switch (thread.state) {
    case State::exited: return "has exited";
    case State::at_barrier: return "waits at the barrier in line " + std::to_string(thread.line);
    case State::at_mbarrier: return "waits for a phase of an mbarrier";
    default: {
      char text[64];
      snprintf(text, sizeof text, "waits for the lanes 0x%08x of its warp", thread.mask);
      return text;
    }
  }
}

// Nobody is ready: lets the block go on, or fails. False when all have exited.
static bool meet() {
  if (resolve_warps() || resolve_mbarriers()) return true;
  int at_barrier = 0, exited = 0;
  const Thread *one = nullptr, *other = nullptr;
  for (int id = 0; id < block.threads; ++id) {
    at_barrier += threads[id].state == State::at_barrier;
    exited += threads[id].state == State::exited;
    if (threads[id].state != State::exited && !one) one = &threads[id];
  }
  if (exited == block.threads) {
    end_block_of_copies();
    end_block_of_products();
    return false;
  }
  bool same = at_barrier == block.threads;
  for (int id = 0; id < block.threads; ++id) {
    bool like = threads[id].state == one->state && (one->state != State::at_barrier || threads[id].line == one->line);
    if (!like && !other) other = &threads[id];
    same &= like;
  }
  if (!same) {
    std::string what = (at_barrier ? "a barrier that not all threads come to: " : "nobody can go on: ");
    what += name_of(*one) + " " + waiting_for(*one);
    if (other) what += ", " + name_of(*other) + " " + waiting_for(*other);
    fail(what);
  }
  block_ordered();
  shuffle_priorities();
  for (int id = 0; id < block.threads; ++id) threads[id].state = State::ready;
  return true;
}

static void run_block() {
  const EmuLaunch& launch = *block.launch;
  for (int id = 0; id < block.threads; ++id) {
    Thread& thread = threads[id];
    unsigned x = launch.block[0], y = launch.block[1];
    thread.id = id;
    thread.index = {id % x, id / x % y, id / (x * y)};
    thread.state = State::ready;
    thread.groups.clear();
    thread.uncommitted.clear();
  }
  memset(block.shared, 0xff, block.shared_bytes);  // NaN in every type
  block.sites.clear();
  block.arrays.clear();
  size_t dynamic = launch.dynamic_bytes;
  block.shared_bytes = (dynamic + 127) / 128 * 128;
  memset(block.shared, 0xff, block.shared_bytes);
  if (dynamic) block.arrays.push_back({"dynamic shared memory", 0, dynamic});
  new_block();
  new_block_of_copies();
  new_block_of_products();
  shuffle_priorities();
  std::vector<int> order(block.threads);
  for (;;) {
    for (int id = 0; id < block.threads; ++id) order[id] = id;
    std::sort(order.begin(), order.end(), [](int a, int b) { return threads[a].priority < threads[b].priority; });
    bool any = false;
    for (int id : order) {
      while (threads[id].state == State::ready) {
        any = true;
        resume(threads[id]);
        if (block.failed) return;
      }
    }
    if (any) continue;
    if (_setjmp(block.scheduler) != 0) return;  // failed
    if (!meet()) return;
  }
}

static void prepare() {
  if (block.stacks) return;
  auto reserve = [](size_t bytes) {
    return (char*)mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  block.stacks = reserve(kStack * kMaxThreads + kGuard);
  mprotect(block.stacks + kStack * kMaxThreads, kGuard, PROT_NONE);
  block.shared = reserve(kShared);
  for (int id = 0; id < kMaxThreads; ++id) {
    threads[id].stack = block.stacks + kStack * id;
    mprotect(threads[id].stack, kGuard, PROT_NONE);
  }
}

static const char* refusal(const EmuLaunch& launch) {
  uint64_t count = uint64_t(launch.block[0]) * launch.block[1] * launch.block[2];
  if (!count || count > kMaxThreads) return "a block of no threads, or of more than 1024";
  if (launch.max_threads && count > uint64_t(launch.max_threads)) return "more threads than __launch_bounds__ says";
  if (launch.dynamic_bytes > kShared) return "more dynamic shared memory than a block can have";
  if (launch.grid[1] > 65535 || launch.grid[2] > 65535) return "more than 65535 blocks along y or z";
  return nullptr;
}

static void run(const EmuLaunch& launch) {
  block.launch = &launch;
  block.failed = false;
  block.threads = int(launch.block[0] * launch.block[1] * launch.block[2]);
  prepare();
  Guarded guarded;
  random_order.seed(launch.seed);
  new_launch();
  std::vector<uint32_t> blocks(size_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = uint32_t(i);
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  for (uint32_t number : blocks) {
    unsigned x = launch.grid[0], y = launch.grid[1];
    block.index = {number % x, number / x % y, number / (x * y)};
    run_block();
    if (block.failed) break;
  }
  if (!block.failed) return;
  block.self = nullptr, block.checking = false;
  for (auto& thread : threads) thread.started = false;  // stacks hold what was left in the middle
}

}  // namespace emu

using namespace emu;

extern "C" {

int emu_launch(const EmuLaunch* launch, char* error, size_t error_bytes) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (const char* reason = refusal(*launch)) {
    snprintf(error, error_bytes, "%s: cannot be launched: %s", launch->name, reason);
    return 1;
  }
  run(*launch);
  if (block.failed) snprintf(error, error_bytes, "%s", block.error.c_str());
  return block.failed;
}

uint3 emu_thread_index() { return block.self->index; }
uint3 emu_block_index() { return block.index; }
dim3 emu_block_size() { return {block.launch->block[0], block.launch->block[1], block.launch->block[2]}; }
dim3 emu_grid_size() { return {block.launch->grid[0], block.launch->grid[1], block.launch->grid[2]}; }

void emu_fail(const char* what) { fail(name_of(*block.self) + ": " + what, __builtin_return_address(0)); }

void emu_barrier(int line) {
  block.self->line = line;
  block.self->state = State::at_barrier;
  yield();
}

uint32_t emu_active_mask(int line) {
  block.self->line = line;
  block.self->state = State::at_active_mask;
  yield();
  return block.self->mask;
}

void emu_collective(EmuCollective run, int variant, uint32_t mask, void* operands) {
  Thread& me = *block.self;
  if (!(mask >> me.id % kWarp & 1))
    fail(name_of(me) + " is not in the mask of the instruction that it executes", __builtin_return_address(0));
  me.collective = run, me.variant = variant, me.mask = mask, me.operands = operands;
  me.state = State::at_warp;
  if (uint32_t lanes = gathered(me)) run_collective(lanes, me.id / kWarp);
  else yield();
}

void emu_sync_warp(uint32_t mask) { emu_collective(nullptr, 0, mask, nullptr); }

void* emu_static_shared(int site, const char* name, size_t bytes, size_t align) {
  auto found = block.sites.find(site);
  if (found != block.sites.end()) return block.shared + found->second;
  // A gap behind each array: what runs over the end of one lies in none.
  size_t offset = (block.shared_bytes + align - 1) / align * align;
  size_t end = (offset + bytes + 127) / 128 * 128;
  if (end > kShared) fail("more shared memory than a block can have: " + std::string(name));
  memset(block.shared + offset, 0xff, end - offset);
  block.shared_bytes = end + 128 <= kShared ? end + 128 : end;
  block.arrays.push_back({name, offset, bytes});
  block.sites.emplace(site, offset);
  return block.shared + offset;
}

void* emu_dynamic_shared() { return block.shared; }

uint32_t emu_shared_address(const void* pointer) {
  size_t offset = size_t((const char*)pointer - block.shared);
  if (offset > kShared) fail(name_of(*block.self) + " takes the shared address of " + place_of(pointer));
  return kSharedWindow + uint32_t(offset);
}

void* emu_shared_pointer(uint32_t address, size_t bytes) {
  size_t offset = size_t(address) - kSharedWindow;
  if (offset > kShared || offset + bytes > kShared) {
    char text[32];
    snprintf(text, sizeof text, "0x%x", address);
    fail(name_of(*block.self) + " uses " + text + " as an address of shared memory", __builtin_return_address(0));
  }
  return block.shared + offset;
}
}
