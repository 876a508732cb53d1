// Products of warpgroups. Each warp makes its 16 rows of the 64; nothing orders the four warps, whose instructions must be
// the same.
//
// From the issue to the wait that covers it, accumulators hold rubbish, which nobody may replace, and what a product reads
// of shared memory nobody may write. Registers of A are read at the issue: CUDA C passes them as values.
#include <cstring>
#include <unordered_map>

#include "../include/async.h"
#include "cells.h"
#include "elements.h"

namespace emu {

constexpr uint32_t kRubbish = 0xffbadbad;  // NaN
constexpr int kRowBytes = 32;              // of A and B along k
constexpr int kGroup = 4;                  // warps

struct Span {
  const char* at;
  size_t bytes;
};

struct Product {
  uint32_t issued;
  std::vector<Span> reads;
  std::vector<uint32_t*> registers;
};

struct InFlight {  // what an accumulator will hold, of how many products
  uint32_t bits;
  int products, variant;
};

struct Warp {
  bool fenced = false, fenced_a = false;  // wgmma.fence since the last wait; and since the last commit
  std::vector<Product> uncommitted;
  std::vector<std::vector<Product>> groups;
  std::unordered_map<uint32_t*, InFlight> registers;
  size_t issued = 0;
};

struct Issue {  // what the warps of a group must have in common
  int variant;
  uint64_t a, b;
  bool accumulate;
};

static Warp warps[kMaxThreads / kWarp];
static std::vector<Issue> issues[kMaxThreads / kWarp / kGroup];

void new_block_of_products() {
  for (auto& warp : warps) warp = Warp();
  for (auto& list : issues) list.clear();
}

void end_block_of_products() {
  for (int warp = 0; warp * kWarp < block.threads; ++warp) {
    if (!warps[warp].registers.empty()) fail("the block ends while a product of a warpgroup is in flight");
    if (warps[warp].issued != issues[warp / kGroup].size()) fail("a wgmma that not all warps of a warpgroup came to");
  }
}

static int warp_of_caller() { return block.self->id / kWarp; }
static uint16_t lanes_of_caller() { return uint16_t(kLanes | warp_of_caller()); }

static void whole_group(const EmuWarp& call) {
  if (call.lanes != ~0u || (warp_of_caller() / kGroup + 1) * kGroup * kWarp > block.threads)
    fail("wgmma without all threads of a warpgroup");
}

// PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts", K-major. With pitch bytes of 16 (no swizzle), 32, 64 or 128:
// a row has `pitch` bytes side by side, eight rows follow one another, the next eight begin SBO bytes on; without a swizzle,
// the row's second 16 bytes lie LBO bytes on. A swizzle of 2**b chunks of 16 bytes flips bits 4 … 4 + b - 1 of an address by
// bits 7 … 7 + b - 1.
class Matrix {
 public:
  explicit Matrix(uint64_t descriptor)
      : start_(uint32_t(descriptor & 0x3fff) << 4), leading_(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride_(uint32_t(descriptor >> 32 & 0x3fff) << 4), bits_((4 - int(descriptor >> 62)) % 4) {
    uint32_t pitch = 16u << bits_;
    if (descriptor >> 49 & 7) fail("a matrix descriptor with a base offset, which is not emulated");
    if (bits_ && (start_ % (8 * pitch) >= pitch || stride_ % (8 * pitch)))
      fail("a matrix descriptor whose swizzled rows do not begin where their pattern does");
    if (bits_ && start_ % pitch + kRowBytes > pitch) fail("a matrix descriptor whose rows run over their swizzle's width");
  }
  // Where the 16 bytes of chunk 0 or 1 of a row lie.
  const char* chunk(int row, int i) const {
    uint32_t pitch = 16u << bits_, address = start_ + row / 8 * stride_ + row % 8 * pitch;
    address += bits_ ? i * 16 : i * leading_;
    address ^= (address >> 7 & ((1u << bits_) - 1)) << 4;
    return (const char*)emu_shared_pointer(kSharedWindow + address, 16);
  }

 private:
  uint32_t start_, leading_, stride_;
  int bits_;
};

// A row of 32 bytes, as the asynchronous proxy sees it now.
static void read_row(const Matrix& matrix, int row, uint32_t (&words)[8], Product& product) {
  for (int i = 0; i < 2; ++i) {
    const char* chunk = matrix.chunk(row, i);
    access(chunk, 16, Kind::read, lanes_of_caller(), nullptr);
    demand_proxy_fence(chunk, 16, lanes_of_caller());
    memcpy(words + 4 * i, chunk, 16);
    product.reads.push_back({chunk, 16});
  }
}

static void agree(Warp& warp, const Issue& mine) {
  auto& list = issues[warp_of_caller() / kGroup];
  if (warp.issued == list.size()) list.push_back(mine);
  const Issue& other = list[warp.issued++];
  if (other.variant != mine.variant || other.a != mine.a || other.b != mine.b || other.accumulate != mine.accumulate)
    fail("a wgmma that differs between the warps of a warpgroup");
}

static uint32_t value_of(Warp& warp, uint32_t* where, int variant) {
  auto found = warp.registers.find(where);
  if (found == warp.registers.end()) return *where;
  if (*where != kRubbish) fail("an accumulator was written while a product is in flight");
  if (found->second.variant != variant) fail("products of other shapes or types on accumulators that are in flight");
  return found->second.bits;
}

static void land(Warp& warp, const Product& product) {
  for (const Span& span : product.reads) {
    for (size_t i = 0; i < span.bytes; ++i)
      if (shared_cells[span.at + i - block.shared].wrote >= product.issued)
        fail("a product in flight reads " + place_of(span.at + i) + ", which was written before the wait");
    access(span.at, span.bytes, Kind::read, lanes_of_caller(), nullptr);
  }
  for (uint32_t* where : product.registers) {
    auto found = warp.registers.find(where);
    if (*where != kRubbish) fail("an accumulator was written while a product is in flight");
    if (--found->second.products) continue;
    *where = found->second.bits;
    warp.registers.erase(found);
  }
}

}  // namespace emu

using namespace emu;

extern "C" {

void emu_wgmma_fence(EmuWarp& call) {
  whole_group(call);
  warps[warp_of_caller()].fenced = warps[warp_of_caller()].fenced_a = true;
}

void emu_wgmma_commit(EmuWarp& call) {
  whole_group(call);
  Warp& warp = warps[warp_of_caller()];
  warp.groups.push_back(std::move(warp.uncommitted));
  warp.uncommitted.clear();
  warp.fenced_a = false;
}

void emu_wgmma_wait(EmuWarp& call) {
  whole_group(call);
  Warp& warp = warps[warp_of_caller()];
  while (int(warp.groups.size()) > call.variant) {
    for (const Product& product : warp.groups.front()) land(warp, product);
    warp.groups.erase(warp.groups.begin());
  }
  warp.fenced = false;
}

// PTX ISA, "Matrix Fragments for wgmma.mma_async": of warp w of the group, with g = lane / 4 and t = lane % 4, and e elements
// in a register,
//   a: register r, element j: row 16 w + g + 8 (r % 2), column t e + j + 4 e (r / 2)
//   d: element i: row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2
// Sums here are rounded once.
void emu_wgmma(EmuWarp& call) {
  whole_group(call);
  Warp& warp = warps[warp_of_caller()];
  const EmuWgmma& first = *(EmuWgmma*)call.operands[0];
  int N = call.variant & 0xfff;
  EmuType ta = EmuType(call.variant >> 12 & 15), tb = EmuType(call.variant >> 16 & 15);
  bool a_in_registers = call.variant >> 20;
  if (!warp.fenced || (a_in_registers && !warp.fenced_a)) fail("a wgmma without wgmma.fence behind what wrote its registers");
  for (int lane = 1; lane < kWarp; ++lane) {
    const EmuWgmma& mine = *(EmuWgmma*)call.operands[lane];
    if (mine.a_descriptor != first.a_descriptor || mine.b_descriptor != first.b_descriptor ||
        mine.accumulate != first.accumulate)
      fail("a wgmma whose descriptors differ from lane to lane");
  }
  agree(warp, {call.variant, first.a_descriptor, first.b_descriptor, first.accumulate});
  int e = 32 / bits_of(ta), K = 8 * e;
  Product product{++now, {}, {}};
  static float a[16][32], b[256][32];
  uint32_t words[8];
  Matrix of_b(first.b_descriptor);
  for (int n = 0; n < N; ++n) {
    read_row(of_b, n, words, product);
    for (int k = 0; k < K; ++k) b[n][k] = element(words, k, tb);
  }
  if (a_in_registers) {
    for (int lane = 0; lane < kWarp; ++lane)
      for (int r = 0; r < 4; ++r)
        for (int j = 0; j < e; ++j)
          a[lane / 4 + 8 * (r % 2)][lane % 4 * e + j + 4 * e * (r / 2)] =
              element(((EmuWgmma*)call.operands[lane])->a, r * e + j, ta);
  } else {
    Matrix of_a(first.a_descriptor);
    for (int row = 0; row < 16; ++row) {
      read_row(of_a, warp_of_caller() % kGroup * 16 + row, words, product);
      for (int k = 0; k < K; ++k) a[row][k] = element(words, k, ta);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const EmuWgmma& mine = *(EmuWgmma*)call.operands[lane];
    for (int i = 0; i < N / 2; ++i) {
      int row = lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      uint32_t* where = (uint32_t*)mine.d[i];
      uint32_t bits = mine.accumulate ? value_of(warp, where, call.variant) : 0;
      if (is_integer(ta)) {
        int64_t sum = int32_t(bits);
        for (int k = 0; k < K; ++k) sum += int64_t(a[row][k]) * int64_t(b[column][k]);
        bits = uint32_t(sum);  // wraps
      } else {
        double sum = element(&bits, 0, EMU_F32);
        for (int k = 0; k < K; ++k) sum += double(a[row][k]) * double(b[column][k]);
        float rounded = float(sum);
        memcpy(&bits, &rounded, 4);
      }
      InFlight& later = warp.registers[where];
      later.bits = bits, later.variant = call.variant, ++later.products;
      *where = kRubbish;
      product.registers.push_back(where);
    }
  }
  warp.uncommitted.push_back(std::move(product));
}
}
