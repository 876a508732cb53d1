// Numbers of 16 and 8 bits: formats with conversions that round to nearest even, and CUDA's types of two bytes over them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define EMU_INLINE inline __attribute__((always_inline))

struct HalfFormat {
  static EMU_INLINE float to_float(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return float(value);
  }
  static EMU_INLINE uint16_t from_double(double value) { return bits_of(_Float16(value)); }
  static EMU_INLINE uint16_t from_float(float value) { return bits_of(_Float16(value)); }

 private:
  static EMU_INLINE uint16_t bits_of(_Float16 value) {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    return bits;
  }
};

struct Bfloat16Format {
  static EMU_INLINE float to_float(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
  static EMU_INLINE uint16_t from_float(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return 0x7fff;
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  static inline uint16_t from_double(double value) {  // rounds to odd first, so that there is one rounding
    float near = float(value);
    if (double(near) != value && std::isfinite(near)) {
      if (std::fabs(double(near)) > std::fabs(value)) near = std::nextafterf(near, 0.f);
      uint32_t word;
      memcpy(&word, &near, 4);
      word |= 1;
      memcpy(&near, &word, 4);
    }
    return from_float(near);
  }
};

// Eight bits with EXPONENT of them for the exponent. `kMax` is the largest finite value; conversions saturate to it.
template <int EXPONENT, int NAN_BITS, int INFINITY_BITS>
struct Float8Format {
  static constexpr int kMantissa = 7 - EXPONENT, kBias = (1 << (EXPONENT - 1)) - 1;
  static inline float to_float(uint8_t bits) {
    int magnitude = bits & 0x7f, exponent = magnitude >> kMantissa, mantissa = magnitude & ((1 << kMantissa) - 1);
    float value = exponent ? std::ldexp(float(mantissa + (1 << kMantissa)), exponent - kBias - kMantissa)
                           : std::ldexp(float(mantissa), 1 - kBias - kMantissa);
    if (magnitude == INFINITY_BITS) value = INFINITY;
    else if (magnitude >= NAN_BITS) value = NAN;
    return bits & 0x80 ? -value : value;
  }
  static inline uint8_t from_float(float value) {
    if (value != value) return 0x7f;
    uint8_t sign = std::signbit(value) ? 0x80 : 0;
    constexpr int largest = (INFINITY_BITS < NAN_BITS ? INFINITY_BITS : NAN_BITS) - 1;
    float magnitude = std::fabs(value);
    if (magnitude >= to_float(largest)) return sign | largest;
    int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), 1 - kBias) : 1 - kBias;
    int steps = int(std::nearbyint(std::ldexp(magnitude, kMantissa - exponent)));  // nearest even
    int bits = steps + ((exponent + kBias - 1) << kMantissa);
    return sign | uint8_t(bits > largest ? largest : bits);
  }
};
using E4m3Format = Float8Format<4, 0x7f, 0x100>;  // no infinity
using E5m2Format = Float8Format<5, 0x7d, 0x7c>;

template <class Format>
struct alignas(2) Float16 {
  unsigned short __x;

  Float16() = default;
  EMU_INLINE Float16(float value) : __x(Format::from_float(value)) {}
  EMU_INLINE Float16(double value) : __x(Format::from_double(value)) {}
  EMU_INLINE Float16(int value) : Float16(double(value)) {}
  EMU_INLINE Float16(unsigned value) : Float16(double(value)) {}
  EMU_INLINE Float16(long value) : Float16(double(value)) {}
  EMU_INLINE Float16(long long value) : Float16(double(value)) {}
  EMU_INLINE Float16(unsigned long value) : Float16(double(value)) {}
  EMU_INLINE Float16(unsigned long long value) : Float16(double(value)) {}
  template <class Other>
  EMU_INLINE explicit Float16(Float16<Other> value) : Float16(float(value)) {}

  EMU_INLINE operator float() const { return Format::to_float(__x); }
  static EMU_INLINE Float16 of_bits(unsigned short bits) {
    Float16 value;
    value.__x = bits;
    return value;
  }

  // One operation in float, then one rounding, is exact: a float has more than twice the bits.
#define EMU_OPERATOR(op)                                                                       \
  friend EMU_INLINE Float16 operator op(Float16 a, Float16 b) { return float(a) op float(b); } \
  EMU_INLINE Float16& operator op##=(Float16 other) { return *this = *this op other; }
  EMU_OPERATOR(+)
  EMU_OPERATOR(-)
  EMU_OPERATOR(*)
  EMU_OPERATOR(/)
#undef EMU_OPERATOR
#define EMU_COMPARISON(op) \
  friend EMU_INLINE bool operator op(Float16 a, Float16 b) { return float(a) op float(b); }
  EMU_COMPARISON(<)
  EMU_COMPARISON(>)
  EMU_COMPARISON(<=)
  EMU_COMPARISON(>=)
  EMU_COMPARISON(==)
  EMU_COMPARISON(!=)
#undef EMU_COMPARISON
  friend EMU_INLINE Float16 operator-(Float16 a) { return of_bits(a.__x ^ 0x8000); }
};

template <class Format>
struct alignas(4) Float16x2 {
  Float16<Format> x, y;
  Float16x2() = default;
  EMU_INLINE Float16x2(Float16<Format> x, Float16<Format> y) : x(x), y(y) {}
};
