// Elements of the registers that tensor cores take.
#pragma once
#include <cstring>

#include "../include/emulator.h"
#include "../include/lowp.h"

inline int bits_of(EmuType type) {
  switch (type) {
    case EMU_F16: case EMU_BF16: return 16;
    case EMU_S8: case EMU_U8: case EMU_E4M3: case EMU_E5M2: return 8;
    case EMU_S4: case EMU_U4: return 4;
    default: return 32;
  }
}

inline bool is_integer(EmuType type) { return type == EMU_S8 || type == EMU_U8 || type == EMU_S4 || type == EMU_U4; }

// Element `i` of registers of this type.
inline float element(const uint32_t* registers, int i, EmuType type) {
  int bits = bits_of(type), each = 32 / bits;
  uint32_t word = registers[i / each] >> (i % each * bits);
  switch (type) {
    case EMU_F16: return HalfFormat::to_float(uint16_t(word));
    case EMU_BF16: return Bfloat16Format::to_float(uint16_t(word));
    case EMU_E4M3: return E4m3Format::to_float(uint8_t(word));
    case EMU_E5M2: return E5m2Format::to_float(uint8_t(word));
    case EMU_S8: return int8_t(word);
    case EMU_U8: return uint8_t(word);
    case EMU_S4: return int(word << 28) >> 28;
    case EMU_U4: return word & 15;
    case EMU_TF32: word &= 0xffffe000; break;  // the rest is ignored
    default: break;
  }
  float value;
  memcpy(&value, &word, 4);
  return value;
}
