// CUDA's functions for one thread: mathematics, conversions, bits.
#pragma once
#include <algorithm>

#include "vectors.h"

#define EMU_FN static EMU_INLINE

// CUDA declares min and max for all pairs of arithmetic types.
template <class A, class B>
using EmuCommon = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
template <class A, class B>
EMU_FN EmuCommon<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<EmuCommon<A, B>>) return std::fmax(EmuCommon<A, B>(a), EmuCommon<A, B>(b));
  else return EmuCommon<A, B>(a) > EmuCommon<A, B>(b) ? a : b;
}
template <class A, class B>
EMU_FN EmuCommon<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<EmuCommon<A, B>>) return std::fmin(EmuCommon<A, B>(a), EmuCommon<A, B>(b));
  else return EmuCommon<A, B>(a) < EmuCommon<A, B>(b) ? a : b;
}

// Fast forms are emulated without their errors. glibc has declared their names.
#define __expf emu_fast_exp
#define __exp10f emu_fast_exp10
#define __logf emu_fast_log
#define __log2f emu_fast_log2
#define __log10f emu_fast_log10
#define __sinf emu_fast_sin
#define __cosf emu_fast_cos
#define __tanf emu_fast_tan
#define __powf emu_fast_pow
EMU_FN float emu_fast_exp(float x) { return std::exp(x); }
EMU_FN float emu_fast_exp10(float x) { return std::pow(10.f, x); }
EMU_FN float emu_fast_log(float x) { return std::log(x); }
EMU_FN float emu_fast_log2(float x) { return std::log2(x); }
EMU_FN float emu_fast_log10(float x) { return std::log10(x); }
EMU_FN float emu_fast_sin(float x) { return std::sin(x); }
EMU_FN float emu_fast_cos(float x) { return std::cos(x); }
EMU_FN float emu_fast_tan(float x) { return std::tan(x); }
EMU_FN float emu_fast_pow(float x, float y) { return std::pow(x, y); }
EMU_FN float __fdividef(float x, float y) { return x / y; }
EMU_FN float __saturatef(float x) { return std::fmin(std::fmax(x, 0.f), 1.f); }
EMU_FN float __frcp_rn(float x) { return 1 / x; }
EMU_FN float __fsqrt_rn(float x) { return std::sqrt(x); }
EMU_FN float __frsqrt_rn(float x) { return 1 / std::sqrt(x); }
EMU_FN float __fadd_rn(float x, float y) { return x + y; }
EMU_FN float __fsub_rn(float x, float y) { return x - y; }
EMU_FN float __fmul_rn(float x, float y) { return x * y; }
EMU_FN float __fdiv_rn(float x, float y) { return x / y; }
EMU_FN float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
EMU_FN float rsqrtf(float x) { return 1 / std::sqrt(x); }
EMU_FN double rsqrt(double x) { return 1 / std::sqrt(x); }
EMU_FN float rcbrtf(float x) { return 1 / std::cbrt(x); }
EMU_FN float normcdff(float x) { return 0.5f * std::erfc(-x * 0.70710678f); }

EMU_FN int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
EMU_FN unsigned __float_as_uint(float x) { unsigned i; memcpy(&i, &x, 4); return i; }
EMU_FN float __int_as_float(int i) { float x; memcpy(&x, &i, 4); return x; }
EMU_FN float __uint_as_float(unsigned i) { float x; memcpy(&x, &i, 4); return x; }
EMU_FN long long __double_as_longlong(double x) { long long i; memcpy(&i, &x, 8); return i; }
EMU_FN double __longlong_as_double(long long i) { double x; memcpy(&x, &i, 8); return x; }

// Conversions to integers saturate on GPUs.
template <class I>
EMU_FN I emu_to_integer(double x) {
  if (x != x) return 0;
  double low = double(std::numeric_limits<I>::min()), high = double(std::numeric_limits<I>::max());
  return x <= low ? std::numeric_limits<I>::min() : x >= high ? std::numeric_limits<I>::max() : I(x);
}
EMU_FN int __float2int_rn(float x) { return emu_to_integer<int>(std::nearbyint(x)); }
EMU_FN int __float2int_rz(float x) { return emu_to_integer<int>(x); }
EMU_FN int __float2int_rd(float x) { return emu_to_integer<int>(std::floor(x)); }
EMU_FN int __float2int_ru(float x) { return emu_to_integer<int>(std::ceil(x)); }
EMU_FN unsigned __float2uint_rn(float x) { return emu_to_integer<unsigned>(std::nearbyint(x)); }
EMU_FN unsigned __float2uint_rz(float x) { return emu_to_integer<unsigned>(x); }
EMU_FN long long __float2ll_rn(float x) { return emu_to_integer<long long>(std::nearbyint(x)); }
EMU_FN long long __float2ll_rz(float x) { return emu_to_integer<long long>(x); }
EMU_FN float __int2float_rn(int x) { return float(x); }
EMU_FN float __uint2float_rn(unsigned x) { return float(x); }

EMU_FN int __popc(unsigned x) { return __builtin_popcount(x); }
EMU_FN int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMU_FN int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
EMU_FN int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
EMU_FN int __ffs(int x) { return __builtin_ffs(x); }
EMU_FN int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
EMU_FN unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
EMU_FN unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return unsigned((uint64_t(high) << 32 | low) << (n & 31) >> 32);
}
EMU_FN unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return unsigned((uint64_t(high) << 32 | low) >> (n & 31));
}
EMU_FN unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned s = selector >> 4 * i & 15, byte = unsigned(bytes >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <class A, class B, class C>
EMU_FN C emu_dp4a(uint32_t a, uint32_t b, C c) {  // A, B: types of the bytes
  for (int i = 0; i < 4; ++i) c += C(int(A(a >> 8 * i)) * int(B(b >> 8 * i)));
  return c;
}
EMU_FN int __dp4a(int a, int b, int c) { return emu_dp4a<int8_t, int8_t>(a, b, c); }
EMU_FN unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return emu_dp4a<uint8_t, uint8_t>(a, b, c); }

template <class T>
EMU_FN T __ldg(const T* p) { return *p; }
template <class T>
EMU_FN T __ldcs(const T* p) { return *p; }
template <class T>
EMU_FN T __ldcg(const T* p) { return *p; }
template <class T>
EMU_FN void __stcs(T* p, T v) { *p = v; }

// Numbers of two bytes.
EMU_FN float __half2float(half x) { return x; }
EMU_FN half __float2half(float x) { return x; }
EMU_FN half __float2half_rn(float x) { return x; }
EMU_FN half __double2half(double x) { return x; }
EMU_FN half __int2half_rn(int x) { return x; }
EMU_FN half __ushort2half_rn(unsigned short x) { return int(x); }
EMU_FN half __short2half_rn(short x) { return int(x); }
EMU_FN int __half2int_rn(half x) { return __float2int_rn(x); }
EMU_FN int __half2int_rz(half x) { return __float2int_rz(x); }
EMU_FN float __bfloat162float(nv_bfloat16 x) { return x; }
EMU_FN nv_bfloat16 __float2bfloat16(float x) { return x; }
EMU_FN nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
EMU_FN nv_bfloat16 __int2bfloat16_rn(int x) { return x; }
EMU_FN half __ushort_as_half(unsigned short x) { return half::of_bits(x); }
EMU_FN half __short_as_half(short x) { return half::of_bits((unsigned short)x); }
EMU_FN unsigned short __half_as_ushort(half x) { return x.__x; }
EMU_FN short __half_as_short(half x) { return short(x.__x); }
EMU_FN nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return nv_bfloat16::of_bits(x); }
EMU_FN unsigned short __bfloat16_as_ushort(nv_bfloat16 x) { return x.__x; }
EMU_FN half2 __floats2half2_rn(float x, float y) { return {x, y}; }
EMU_FN half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
EMU_FN half2 __float2half2_rn(float x) { return {x, x}; }
EMU_FN float2 __half22float2(half2 v) { return {v.x, v.y}; }
EMU_FN nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
EMU_FN nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
EMU_FN nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
EMU_FN float2 __bfloat1622float2(nv_bfloat162 v) { return {v.x, v.y}; }
EMU_FN half2 __halves2half2(half x, half y) { return {x, y}; }
EMU_FN nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
EMU_FN half2 __half2half2(half x) { return {x, x}; }
EMU_FN nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 x) { return {x, x}; }

#define EMU_T template <class F>
#define EMU_1 Float16<F>
#define EMU_2 Float16x2<F>
EMU_T EMU_FN EMU_1 __low2half(EMU_2 v) { return v.x; }
EMU_T EMU_FN EMU_1 __high2half(EMU_2 v) { return v.y; }
EMU_T EMU_FN EMU_1 __low2bfloat16(EMU_2 v) { return v.x; }
EMU_T EMU_FN EMU_1 __high2bfloat16(EMU_2 v) { return v.y; }
EMU_T EMU_FN float __low2float(EMU_2 v) { return v.x; }
EMU_T EMU_FN float __high2float(EMU_2 v) { return v.y; }
EMU_T EMU_FN EMU_1 __habs(EMU_1 a) { return EMU_1::of_bits(a.__x & 0x7fff); }
EMU_T EMU_FN EMU_1 __hneg(EMU_1 a) { return -a; }
EMU_T EMU_FN bool __hisnan(EMU_1 a) { return float(a) != float(a); }
EMU_T EMU_FN bool __hisinf(EMU_1 a) { return std::isinf(float(a)); }
EMU_T EMU_FN EMU_1 __hfma(EMU_1 a, EMU_1 b, EMU_1 c) { return double(float(a)) * double(float(b)) + double(float(c)); }
#define EMU_BINARY(name, expression)                                              \
  EMU_T EMU_FN EMU_1 __h##name(EMU_1 a, EMU_1 b) { return expression; }           \
  EMU_T EMU_FN EMU_2 __h##name##2(EMU_2 a, EMU_2 b) { return {__h##name(a.x, b.x), __h##name(a.y, b.y)}; }
EMU_BINARY(add, a + b)
EMU_BINARY(sub, a - b)
EMU_BINARY(mul, a * b)
EMU_BINARY(max, std::fmax(float(a), float(b)))
EMU_BINARY(min, std::fmin(float(a), float(b)))
EMU_T EMU_FN EMU_1 __hdiv(EMU_1 a, EMU_1 b) { return a / b; }
EMU_T EMU_FN EMU_2 __h2div(EMU_2 a, EMU_2 b) { return {a.x / b.x, a.y / b.y}; }
EMU_T EMU_FN EMU_2 __hfma2(EMU_2 a, EMU_2 b, EMU_2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
EMU_T EMU_FN EMU_2 __hneg2(EMU_2 a) { return {-a.x, -a.y}; }
EMU_T EMU_FN EMU_2 __habs2(EMU_2 a) { return {__habs(a.x), __habs(a.y)}; }
EMU_T EMU_FN bool __hgt(EMU_1 a, EMU_1 b) { return a > b; }
EMU_T EMU_FN bool __hlt(EMU_1 a, EMU_1 b) { return a < b; }
EMU_T EMU_FN bool __hge(EMU_1 a, EMU_1 b) { return a >= b; }
EMU_T EMU_FN bool __hle(EMU_1 a, EMU_1 b) { return a <= b; }
EMU_T EMU_FN bool __heq(EMU_1 a, EMU_1 b) { return a == b; }
EMU_T EMU_FN bool __hne(EMU_1 a, EMU_1 b) { return a != b; }
#define EMU_UNARY(name, expression) \
  EMU_T EMU_FN EMU_1 h##name(EMU_1 h) { float x = h; return expression; } \
  EMU_T EMU_FN EMU_2 h2##name(EMU_2 v) { return {h##name(v.x), h##name(v.y)}; }
EMU_UNARY(exp, std::exp(x))
EMU_UNARY(exp2, std::exp2(x))
EMU_UNARY(exp10, std::pow(10.f, x))
EMU_UNARY(log, std::log(x))
EMU_UNARY(log2, std::log2(x))
EMU_UNARY(log10, std::log10(x))
EMU_UNARY(sqrt, std::sqrt(x))
EMU_UNARY(rsqrt, 1 / std::sqrt(x))
EMU_UNARY(rcp, 1 / x)
EMU_UNARY(sin, std::sin(x))
EMU_UNARY(cos, std::cos(x))
EMU_UNARY(tanh, std::tanh(x))
EMU_UNARY(floor, std::floor(x))
EMU_UNARY(ceil, std::ceil(x))
EMU_UNARY(trunc, std::trunc(x))
EMU_UNARY(rint, std::nearbyint(x))
EMU_T EMU_FN EMU_2 operator+(EMU_2 a, EMU_2 b) { return {a.x + b.x, a.y + b.y}; }
EMU_T EMU_FN EMU_2 operator-(EMU_2 a, EMU_2 b) { return {a.x - b.x, a.y - b.y}; }
EMU_T EMU_FN EMU_2 operator*(EMU_2 a, EMU_2 b) { return {a.x * b.x, a.y * b.y}; }
EMU_T EMU_FN EMU_2 operator/(EMU_2 a, EMU_2 b) { return {a.x / b.x, a.y / b.y}; }
