// What kernels compiled for the CPU ask of the emulator's runtime.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};

// Operands of collective instructions, one of each for every lane.
struct EmuShuffle {
  uint64_t value;  // in: this lane's; out: what it receives
  int size, lane_or_delta, width;
};
struct EmuVote {
  uint64_t value;  // in: a predicate or a number; out: the result
};
struct EmuMatrices {  // ldmatrix, stmatrix
  uint32_t address, registers[4];
};
struct EmuMma {
  const uint32_t *a, *b, *c;
  uint32_t* d;
};
struct EmuTile {  // wmma: `chunks` of `bytes`, `stride` bytes apart, read or written by lanes that nobody names
  char* memory;
  int chunks, stride, bytes;
};
enum EmuType : int { EMU_F16, EMU_BF16, EMU_TF32, EMU_F32, EMU_S32, EMU_S8, EMU_U8, EMU_S4, EMU_U4, EMU_E4M3, EMU_E5M2 };

struct EmuWarp {
  void* operands[32];  // of the lanes that take part; else null
  uint32_t lanes;
  int variant;
};
typedef void (*EmuCollective)(EmuWarp&);

extern "C" {
// Where a thread is. Constant for each: it may be read once.
uint3 emu_thread_index() __attribute__((const));
uint3 emu_block_index() __attribute__((const));
dim3 emu_block_size() __attribute__((const));
dim3 emu_grid_size() __attribute__((const));

// Shared memory. `site` is the number of a declaration in the kernel.
void* emu_static_shared(int site, const char* name, size_t bytes, size_t align);
void* emu_dynamic_shared();
uint32_t emu_shared_address(const void* pointer);
void* emu_shared_pointer(uint32_t address, size_t bytes);

// Waiting for others.
void emu_barrier(int line);
void emu_sync_warp(uint32_t mask);
uint32_t emu_active_mask(int line);
void emu_fence();
void emu_collective(EmuCollective run, int variant, uint32_t mask, void* operands);
void emu_fail(const char* what) __attribute__((noreturn));

// Memory that instructions touch: reported, to be judged.
void emu_reads(const void* pointer, size_t bytes);
void emu_writes(void* pointer, size_t bytes);
void emu_atomic(void* pointer, size_t bytes);
void emu_warp_reads(const void* pointer, size_t bytes);
void emu_warp_writes(void* pointer, size_t bytes);

// Asynchronous copies into shared memory.
void emu_copy_async(uint32_t to, const void* from, int bytes, int from_bytes);
void emu_commit_group();
void emu_wait_group(int newest_left);
void emu_wait_all();

// Collective instructions.
void emu_shuffle(EmuWarp&);  // variant: 'i' index, 'u' up, 'd' down, 'x' xor
void emu_vote(EmuWarp&);     // variant: 'b' ballot, '&', '|', 'a' add, '<' min, '>' max, 'A' 'O' 'X' bitwise
void emu_ldmatrix(EmuWarp&);  // variant: number of matrices, negative if transposed
void emu_stmatrix(EmuWarp&);
void emu_movmatrix(EmuWarp&);
void emu_mma(EmuWarp&);  // variant: emu_mma_variant
void emu_tile(EmuWarp&);  // variant: 'r' reads, 'w' writes

typedef void (*EmuEntry)(void** arguments);
struct EmuLaunch {
  EmuEntry entry;
  void** arguments;
  unsigned grid[3], block[3];
  uint64_t dynamic_bytes, seed;
  int max_threads;
  // Memory that the kernel may touch: pairs of address and bytes. None: all of it.
  const uint64_t* buffers;
  int buffer_count;
  const char* name;
  // What an address outside of shared memory is, in words; null: the number of its buffer.
  void (*describe)(const void* pointer, char* text, size_t bytes);
};
// 0, or 1 with the reason in `error`.
int emu_launch(const EmuLaunch* launch, char* error, size_t error_bytes);
// What is known of accesses to memory that is given back.
void emu_forget(void* at, size_t bytes);
}

constexpr int emu_mma_variant(int m, int k, EmuType a, EmuType b, EmuType c) {  // n is 8
  return m | k << 8 | int(a) << 16 | int(b) << 20 | int(c) << 24;
}
