// The state of the block that runs. One OS thread emulates at a time.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "../include/emulator.h"

namespace emu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10;         // of a thread
constexpr size_t kGuard = 4 << 10;           // of it, at its end, that nobody may touch
constexpr size_t kShared = 227 << 10;        // of a block, at most
constexpr uint32_t kSharedWindow = 1 << 24;  // where shared addresses begin, so that a forgotten base is none

enum class State : uint8_t { ready, at_barrier, at_warp, at_active_mask, at_mbarrier, exited };

struct Copy {
  char* to;
  const char* from;
  int bytes, from_bytes;
};

struct Thread {
  char* stack = nullptr;
  jmp_buf resume;
  ucontext_t start;
  bool started = false;
  State state = State::exited;
  int id = 0;
  uint3 index{};
  int line = 0;                         // of the barrier that it waits at
  EmuCollective collective = nullptr;   // that it waits for, with these
  int variant = 0;
  uint32_t mask = 0;                    // or the answer of an active mask
  void* operands = nullptr;
  std::vector<std::vector<Copy>> groups;  // of copies that were committed, oldest first
  std::vector<Copy> uncommitted;
  uint32_t priority = 0;
};

struct Block {
  const EmuLaunch* launch = nullptr;
  uint3 index{};
  int threads = 0;
  Thread* self = nullptr;      // who runs; null in the scheduler
  bool checking = false;       // accesses are judged
  bool failed = false;
  std::string error;
  char* stacks = nullptr;
  char* shared = nullptr;
  size_t shared_bytes = 0;     // in use
  struct Array {
    std::string name;
    size_t offset, bytes;
  };
  std::vector<Array> arrays;   // in shared memory
  std::unordered_map<int, size_t> sites;
  jmp_buf scheduler;
};

extern Block block;
extern Thread threads[kMaxThreads];

// Back to the scheduler, until it resumes this thread.
void yield();
// Ends the launch with a message; from a thread or from the scheduler.
[[noreturn]] void fail(const std::string& what, const void* where = nullptr);
std::string name_of(const Thread& thread);
void run_collective(uint32_t lanes, int warp);

// mbarrier.cpp, wgmma.cpp
void new_block_of_copies();
void end_block_of_copies();  // fails if any are under way
bool resolve_mbarriers();    // of those whose phase is complete, waiting threads become ready
void new_block_of_products();
void end_block_of_products();

// memory.cpp
void new_launch();
void new_block();
void block_ordered();                       // all threads of the block have met
void warp_ordered(int warp, uint32_t mask);  // these lanes have met
std::string place_of(const void* pointer);

// faults.cpp: while one lives, a thread of the block that crashes ends the launch, and not this process
struct Guarded {
  Guarded();
  ~Guarded();
};

// trace.cpp
void trace(const void* where, size_t offset, size_t bytes, bool writes);  // an access of shared memory

}  // namespace emu
