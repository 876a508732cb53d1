// CUDA's vector types, with its alignments.
#pragma once
#include "lowp.h"

#define EMU_VECTORS(T, name, a2, a4)                                                                 \
  struct name##1 { T x; };                                                                           \
  struct alignas(a2) name##2 { T x, y; };                                                            \
  struct name##3 { T x, y, z; };                                                                     \
  struct alignas(a4) name##4 { T x, y, z, w; };                                                      \
  static EMU_INLINE name##1 make_##name##1(T x) { return {x}; }                                      \
  static EMU_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  static EMU_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
  static EMU_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
// uint3 belongs to the runtime's interface
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static EMU_INLINE uint1 make_uint1(unsigned x) { return {x}; }
static EMU_INLINE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static EMU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
static EMU_INLINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using __half = Float16<HalfFormat>;
using half = __half;
using __half2 = Float16x2<HalfFormat>;
using half2 = __half2;
using __nv_bfloat16 = Float16<Bfloat16Format>;
using nv_bfloat16 = __nv_bfloat16;
using __nv_bfloat162 = Float16x2<Bfloat16Format>;
using nv_bfloat162 = __nv_bfloat162;
static EMU_INLINE half2 make_half2(half x, half y) { return {x, y}; }

typedef unsigned char __nv_fp8_storage_t;
typedef unsigned short __nv_fp8x2_storage_t;
typedef unsigned int __nv_fp8x4_storage_t;

template <class Format>
struct Float8 {
  __nv_fp8_storage_t __x;
  Float8() = default;
  explicit Float8(float value) : __x(Format::from_float(value)) {}
  explicit Float8(double value) : Float8(float(value)) {}
  explicit Float8(half value) : Float8(float(value)) {}
  explicit Float8(nv_bfloat16 value) : Float8(float(value)) {}
  explicit Float8(int value) : Float8(float(value)) {}
  explicit operator float() const { return Format::to_float(__x); }
  explicit operator half() const { return half(float(*this)); }
  explicit operator nv_bfloat16() const { return nv_bfloat16(float(*this)); }
};

template <class Format, class Storage>
struct alignas(sizeof(Storage)) Float8Vector {
  Storage __x;
  Float8Vector() = default;
  template <class V>
  explicit Float8Vector(V low, V high) : __x(Storage(pair(low) | uint32_t(pair(high)) << 16)) {}
  explicit Float8Vector(float2 v) : __x(Storage(pair(v))) {}
  explicit Float8Vector(half2 v) : __x(Storage(pair(v))) {}
  explicit Float8Vector(nv_bfloat162 v) : __x(Storage(pair(v))) {}
  explicit Float8Vector(float4 v) : Float8Vector(float2{v.x, v.y}, float2{v.z, v.w}) {}
  explicit operator half2() const { return {half(at(0)), half(at(1))}; }
  explicit operator nv_bfloat162() const { return {nv_bfloat16(at(0)), nv_bfloat16(at(1))}; }
  explicit operator float2() const { return {at(0), at(1)}; }
  explicit operator float4() const { return {at(0), at(1), at(2), at(3)}; }

 private:
  float at(int i) const { return Format::to_float(uint8_t(__x >> 8 * i)); }
  template <class V>
  static uint32_t pair(V v) {
    return Format::from_float(float(v.x)) | uint32_t(Format::from_float(float(v.y))) << 8;
  }
};
using __nv_fp8_e4m3 = Float8<E4m3Format>;
using __nv_fp8_e5m2 = Float8<E5m2Format>;
using __nv_fp8x2_e4m3 = Float8Vector<E4m3Format, __nv_fp8x2_storage_t>;
using __nv_fp8x2_e5m2 = Float8Vector<E5m2Format, __nv_fp8x2_storage_t>;
using __nv_fp8x4_e4m3 = Float8Vector<E4m3Format, __nv_fp8x4_storage_t>;
using __nv_fp8x4_e5m2 = Float8Vector<E5m2Format, __nv_fp8x4_storage_t>;
// TVM's header names the third format wherever it names these two; nothing computes with it.
struct __nv_fp8_e8m0 {
  __nv_fp8_storage_t __x;
  explicit operator half() const { return half(std::ldexp(1.0, __x - 127)); }
  explicit operator nv_bfloat16() const { return nv_bfloat16(std::ldexp(1.0, __x - 127)); }
};
struct __nv_fp8x2_e8m0 {
  __nv_fp8x2_storage_t __x;
  __nv_fp8x2_e8m0() = default;
  template <class V> explicit __nv_fp8x2_e8m0(V) { emu_fail("e8m0 from other formats is not emulated"); }
  explicit operator half2() const { emu_fail("e8m0 in pairs is not emulated"); }
  explicit operator nv_bfloat162() const { emu_fail("e8m0 in pairs is not emulated"); }
};
struct __nv_fp8x4_e8m0 { __nv_fp8x4_storage_t __x; };
