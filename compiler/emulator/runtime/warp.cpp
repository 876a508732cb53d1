// Instructions that the lanes of a warp execute together.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "elements.h"
#include "state.h"

using namespace emu;

template <class T>
static T* of(EmuWarp& call, int lane) {
  return (T*)call.operands[lane];
}

static void whole_warp(const EmuWarp& call, const char* name) {
  if (call.lanes != ~0u) fail(std::string(name) + " without all lanes of the warp");
}

extern "C" {

void emu_shuffle(EmuWarp& call) {
  uint64_t values[32];
  for (int lane = 0; lane < 32; ++lane) values[lane] = call.operands[lane] ? of<EmuShuffle>(call, lane)->value : ~0ull;
  for (int lane = 0; lane < 32; ++lane) {
    EmuShuffle* mine = of<EmuShuffle>(call, lane);
    if (!mine) continue;
    int width = mine->width, first = lane & ~(width - 1), last = first + width - 1, n = mine->lane_or_delta, from = lane;
    if (width < 1 || width > 32 || width & (width - 1)) fail("a shuffle of a width that is no power of two");
    switch (call.variant & 0xff) {
      case 'i': from = first + (n & (width - 1)); break;
      case 'u': from = lane - n < first ? lane : lane - n; break;
      case 'd': from = lane + n > last ? lane : lane + n; break;
      case 'x': from = (lane ^ n) > last ? lane : lane ^ n; break;
    }
    mine->value = values[from];  // all ones from a lane that takes no part
  }
}

void emu_vote(EmuWarp& call) {
  uint32_t ballot = 0, bits_and = ~0u, bits_or = 0, bits_xor = 0, sum = 0;
  int64_t least = INT64_MAX, most = INT64_MIN;
  for (int lane = 0; lane < 32; ++lane) {
    if (!call.operands[lane]) continue;
    uint64_t value = of<EmuVote>(call, lane)->value;
    uint32_t word = uint32_t(value);
    if (value) ballot |= 1u << lane;
    bits_and &= word, bits_or |= word, bits_xor ^= word, sum += word;
    least = std::min(least, int64_t(value)), most = std::max(most, int64_t(value));
  }
  uint64_t result = 0;
  switch (call.variant) {
    case 'b': result = ballot; break;
    case '&': result = ballot == call.lanes; break;
    case '|': result = ballot != 0; break;
    case 'a': result = sum; break;
    case '<': result = uint64_t(least); break;
    case '>': result = uint64_t(most); break;
    case 'A': result = bits_and; break;
    case 'O': result = bits_or; break;
    case 'X': result = bits_xor; break;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (call.operands[lane]) of<EmuVote>(call, lane)->value = result;
}

// PTX ISA, ldmatrix: lanes 8 m to 8 m + 7 hold the addresses of the rows of matrix m. A lane receives two neighbours of
// row lane / 4, or of column lane / 4 where transposed.
void emu_ldmatrix(EmuWarp& call) {
  whole_warp(call, "ldmatrix");
  int count = std::abs(call.variant);
  for (int m = 0; m < count; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      uint32_t address = of<EmuMatrices>(call, 8 * m + row)->address;
      if (address % 16) fail("ldmatrix of a row that does not begin at a multiple of 16 bytes");
      void* memory = emu_shared_pointer(address, 16);
      emu_warp_reads(memory, 16);
      memcpy(matrix[row], memory, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      int r = lane / 4, c = 2 * (lane % 4);
      uint16_t low = call.variant > 0 ? matrix[r][c] : matrix[c][r];
      uint16_t high = call.variant > 0 ? matrix[r][c + 1] : matrix[c + 1][r];
      of<EmuMatrices>(call, lane)->registers[m] = low | uint32_t(high) << 16;
    }
  }
}

static void gather(EmuWarp& call, int m, bool transposed, uint16_t (&matrix)[8][8]) {
  for (int lane = 0; lane < 32; ++lane) {
    uint32_t word = of<EmuMatrices>(call, lane)->registers[m];
    for (int i = 0; i < 2; ++i) {
      int r = lane / 4, c = 2 * (lane % 4) + i;
      (transposed ? matrix[c][r] : matrix[r][c]) = uint16_t(word >> 16 * i);
    }
  }
}

void emu_stmatrix(EmuWarp& call) {
  whole_warp(call, "stmatrix");
  for (int m = 0; m < std::abs(call.variant); ++m) {
    uint16_t matrix[8][8];
    gather(call, m, call.variant < 0, matrix);
    for (int row = 0; row < 8; ++row) {
      uint32_t address = of<EmuMatrices>(call, 8 * m + row)->address;
      if (address % 16) fail("stmatrix of a row that does not begin at a multiple of 16 bytes");
      void* memory = emu_shared_pointer(address, 16);
      emu_warp_writes(memory, 16);
      memcpy(memory, matrix[row], 16);
    }
  }
}

void emu_movmatrix(EmuWarp& call) {
  whole_warp(call, "movmatrix");
  uint16_t matrix[8][8];
  gather(call, 0, true, matrix);
  for (int lane = 0; lane < 32; ++lane) {
    int r = lane / 4, c = 2 * (lane % 4);
    of<EmuMatrices>(call, lane)->registers[0] = matrix[r][c] | uint32_t(matrix[r][c + 1]) << 16;
  }
}

void emu_tile(EmuWarp& call) {
  whole_warp(call, "wmma");
  const EmuTile& tile = *of<EmuTile>(call, 0);
  for (int lane = 1; lane < 32; ++lane)
    if (of<EmuTile>(call, lane)->memory != tile.memory || of<EmuTile>(call, lane)->stride != tile.stride)
      fail("wmma with memory that differs from lane to lane");
  for (int i = 0; i < tile.chunks; ++i) {
    char* chunk = tile.memory + int64_t(i) * tile.stride;
    call.variant == 'r' ? emu_warp_reads(chunk, tile.bytes) : emu_warp_writes(chunk, tile.bytes);
  }
}
}

// PTX ISA, fragments of mma.sync of n = 8: with g = lane / 4 and t = lane % 4, and e elements in a register,
//   a: register r, element j: row g + 8 (r odd, where m is 16), column t e + j + 4 e (r / 2; r where m is 8)
//   b: register r, element j: row t e + j + 4 e r, column g
//   c, d: element i: row g + 8 (i / 2), column 2 t + i % 2
// Sums here are rounded once; those of hardware, in an order that nobody states.
extern "C" void emu_mma(EmuWarp& call) {
  whole_warp(call, "mma.sync");
  int M = call.variant & 0xff, K = call.variant >> 8 & 0xff;
  EmuType ta = EmuType(call.variant >> 16 & 15), tb = EmuType(call.variant >> 20 & 15), tc = EmuType(call.variant >> 24);
  int e = 32 / bits_of(ta), halves = M / 8;
  static float a[16][256], b[256][8];
  for (int lane = 0; lane < 32; ++lane) {
    const EmuMma& mine = *of<EmuMma>(call, lane);
    int g = lane / 4, t = lane % 4;
    for (int r = 0; r < halves * K / (4 * e); ++r)
      for (int j = 0; j < e; ++j) a[g + 8 * (r % halves)][t * e + j + 4 * e * (r / halves)] = element(mine.a, r * e + j, ta);
    for (int r = 0; r < K / (4 * e); ++r)
      for (int j = 0; j < e; ++j) b[t * e + j + 4 * e * r][g] = element(mine.b, r * e + j, tb);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const EmuMma& mine = *of<EmuMma>(call, lane);
    uint32_t results[4] = {};
    for (int i = 0; i < 2 * halves; ++i) {
      int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      if (is_integer(ta)) {
        int64_t sum = int32_t(mine.c[i]);
        for (int k = 0; k < K; ++k) sum += int64_t(a[row][k]) * int64_t(b[k][column]);
        results[i] = uint32_t(sum);  // wraps
        continue;
      }
      double sum = element(mine.c, i, tc);
      for (int k = 0; k < K; ++k) sum += double(a[row][k]) * double(b[k][column]);
      if (tc == EMU_F16) {
        results[i / 2] |= uint32_t(HalfFormat::from_double(sum)) << 16 * (i % 2);
      } else {
        float rounded = float(sum);
        memcpy(&results[i], &rounded, 4);
      }
    }
    memcpy(mine.d, results, tc == EMU_F16 ? 2 * halves / 2 * 4 : 2 * halves * 4);
  }
}
