// CUDA's functions for several threads: barriers, warps, atomics; and what PTX instructions become.
#pragma once
#include "emulator.h"
#include "intrinsics.h"

#define threadIdx emu_thread_index()
#define blockIdx emu_block_index()
#define blockDim emu_block_size()
#define gridDim emu_grid_size()
#define warpSize 32

#define __syncthreads() emu_barrier(__LINE__)
#define __activemask() emu_active_mask(__LINE__)
EMU_FN void __syncwarp(unsigned mask = 0xffffffffu) { emu_sync_warp(mask); }
EMU_FN void __threadfence() { emu_fence(); }
EMU_FN void __threadfence_block() { emu_fence(); }
EMU_FN size_t __cvta_generic_to_shared(const void* p) { return emu_shared_address(p); }
EMU_FN void __trap() { emu_fail("trap"); }

template <class T>
EMU_FN T emu_shuffled(int variant, unsigned mask, T value, int n, int width) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  EmuShuffle mine{0, int(sizeof(T)), n, width};
  memcpy(&mine.value, &value, sizeof(T));
  emu_collective(emu_shuffle, variant, mask, &mine);
  memcpy(&value, &mine.value, sizeof(T));
  return value;
}
template <class T>
EMU_FN T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emu_shuffled('i', mask, value, lane, width);
}
template <class T>
EMU_FN T __shfl_up_sync(unsigned mask, T value, unsigned n, int width = 32) {
  return emu_shuffled('u', mask, value, int(n), width);
}
template <class T>
EMU_FN T __shfl_down_sync(unsigned mask, T value, unsigned n, int width = 32) {
  return emu_shuffled('d', mask, value, int(n), width);
}
template <class T>
EMU_FN T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emu_shuffled('x', mask, value, bits, width);
}
EMU_FN uint64_t emu_voted(int variant, unsigned mask, uint64_t value) {
  EmuVote mine{value};
  emu_collective(emu_vote, variant, mask, &mine);
  return mine.value;
}
EMU_FN unsigned __ballot_sync(unsigned mask, int predicate) { return unsigned(emu_voted('b', mask, predicate != 0)); }
EMU_FN int __all_sync(unsigned mask, int predicate) { return int(emu_voted('&', mask, predicate != 0)); }
EMU_FN int __any_sync(unsigned mask, int predicate) { return int(emu_voted('|', mask, predicate != 0)); }
EMU_FN int __reduce_add_sync(unsigned mask, int x) { return int(emu_voted('a', mask, unsigned(x))); }
EMU_FN unsigned __reduce_add_sync(unsigned mask, unsigned x) { return unsigned(emu_voted('a', mask, x)); }
template <class T>
EMU_FN T __reduce_min_sync(unsigned mask, T x) { return T(emu_voted('<', mask, uint64_t(int64_t(x)))); }
template <class T>
EMU_FN T __reduce_max_sync(unsigned mask, T x) { return T(emu_voted('>', mask, uint64_t(int64_t(x)))); }
EMU_FN unsigned __reduce_and_sync(unsigned mask, unsigned x) { return unsigned(emu_voted('A', mask, x)); }
EMU_FN unsigned __reduce_or_sync(unsigned mask, unsigned x) { return unsigned(emu_voted('O', mask, x)); }
EMU_FN unsigned __reduce_xor_sync(unsigned mask, unsigned x) { return unsigned(emu_voted('X', mask, x)); }

// No thread is interrupted, so that plain operations are atomic; they are reported as what they are.
template <class T, class Update>
__attribute__((no_sanitize_thread, noinline)) static T emu_update(T* p, Update update) {
  emu_atomic(p, sizeof(T));
  T old = *p;
  *p = update(old);
  return old;
}
#define EMU_ATOMIC(name, expression)                                           \
  template <class T, class V>                                                  \
  EMU_FN T name(T* p, V v) {                                                   \
    T b = T(v);                                                                \
    return emu_update(p, [=](T a) { return T(expression); }); \
  }
EMU_ATOMIC(atomicAdd, a + b)
EMU_ATOMIC(atomicSub, a - b)
EMU_ATOMIC(atomicExch, ((void)a, b))
EMU_ATOMIC(atomicMax, a > b ? a : b)
EMU_ATOMIC(atomicMin, a < b ? a : b)
EMU_ATOMIC(atomicAnd, a & b)
EMU_ATOMIC(atomicOr, a | b)
EMU_ATOMIC(atomicXor, a ^ b)
EMU_ATOMIC(atomicInc, a >= b ? 0 : a + 1)
template <class T>
EMU_FN T atomicCAS(T* p, T expected, T desired) {
  return emu_update(p, [=](T old) { return old == expected ? desired : old; });
}

// What the translator makes of PTX instructions.
namespace ptx {
template <int COUNT>
EMU_FN void ldmatrix(uint32_t address, uint32_t* out) {  // COUNT: negative if transposed
  EmuMatrices mine{address, {}};
  emu_collective(emu_ldmatrix, COUNT, ~0u, &mine);
  for (int i = 0; i < (COUNT < 0 ? -COUNT : COUNT); ++i) out[i] = mine.registers[i];
}
template <int COUNT>
EMU_FN void stmatrix(uint32_t address, const uint32_t* in) {
  EmuMatrices mine{address, {}};
  for (int i = 0; i < (COUNT < 0 ? -COUNT : COUNT); ++i) mine.registers[i] = in[i];
  emu_collective(emu_stmatrix, COUNT, ~0u, &mine);
}
EMU_FN uint32_t movmatrix(uint32_t value) {
  EmuMatrices mine{0, {value}};
  emu_collective(emu_movmatrix, 1, ~0u, &mine);
  return mine.registers[0];
}
EMU_FN void mma(int variant, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c) {
  EmuMma mine{a, b, c, d};
  emu_collective(emu_mma, variant, ~0u, &mine);
}
// A register read as another type of its width. Immediates take the width that is asked for.
template <class To, class From>
EMU_FN To get(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
  } else {
    static_assert(std::is_integral_v<From> && std::is_integral_v<To>, "a register of another width");
    return To(value);
  }
}
template <class To, class From>
EMU_FN void put(To& to, From value) {
  static_assert(sizeof(To) == sizeof(From), "a register of another width");
  memcpy(&to, &value, sizeof(To));
}
EMU_FN uint32_t plus(uint32_t address, int offset) { return address + offset; }
EMU_FN const void* plus(const void* address, int offset) { return (const char*)address + offset; }
EMU_FN uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
// The last operand of shfl.sync says in which segments of the warp lanes exchange.
EMU_FN uint32_t shfl(int variant, uint32_t value, int n, int clamp, uint32_t mask) {
  return emu_shuffled(variant, mask, value, n, 32 - (clamp >> 8));
}
}  // namespace ptx
