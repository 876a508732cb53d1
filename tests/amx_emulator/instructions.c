/* Single tile instructions, written by the assembler, for the emulator's own tests: tile 0 is a destination, 1 and 2 are
 * sources. Loads and stores come in every form that an address can have. */
#include <stdint.h>

void ldtilecfg(const void *config) { __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory"); }
void sttilecfg(void *config) { __asm__ volatile("sttilecfg (%0)" ::"r"(config) : "memory"); }
void tilerelease(void) { __asm__ volatile("tilerelease"); }
void tilezero(void) { __asm__ volatile("tilezero %tmm0"); }

#define TILE(t)                                                                                            \
  void tileload##t(const void *from, int64_t stride) {                                                     \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(stride) : "memory");                 \
  }                                                                                                        \
  void tilestore##t(void *to, int64_t stride) {                                                            \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(stride) : "memory");               \
  }
TILE(0) TILE(1) TILE(2)

#define DOT(name) void name(void) { __asm__ volatile(#name " %tmm2, %tmm1, %tmm0"); }
DOT(tdpbssd) DOT(tdpbsud) DOT(tdpbusd) DOT(tdpbuud) DOT(tdpbf16ps)

/* tdpbssd %tmm1, %tmm1, %tmm0, which assemblers refuse */
void same_tile_twice(void) { __asm__ volatile(".byte 0xC4, 0xE2, 0x73, 0x5E, 0xC1"); }
void another_instruction(void) { __asm__ volatile("ud2"); }

/* Load tile 7 from `from` and store it to `to`, rows `stride` bytes apart, a multiple of `scale`, by an address of the
 * form `offset(base,index,scale)`. */
#define FORM(name, base, index, scale, offset)                                                             \
  void form_##name(const char *from, char *to, int64_t stride) {                                           \
    __asm__ volatile("mov %0, %%" base "\n mov %1, %%" index "\n"                                          \
                     "tileloadd " #offset "(%%" base ",%%" index "," #scale "), %%tmm7" ::                 \
                     "r"(from - offset), "r"(stride / scale) : base, index, "memory");                     \
    __asm__ volatile("mov %0, %%" base "\n mov %1, %%" index "\n"                                          \
                     "tilestored %%tmm7, " #offset "(%%" base ",%%" index "," #scale ")" ::                \
                     "r"(to - offset), "r"(stride / scale) : base, index, "memory");                       \
  }
FORM(plain, "rax", "rcx", 1, 0)
FORM(scaled, "rdx", "rsi", 4, 0)
FORM(near, "rbx", "rdi", 2, 16)
FORM(near_behind, "r8", "r9", 8, -128)
FORM(far, "r10", "r11", 1, 100000)
FORM(far_behind, "rdi", "r14", 1, -70000)
FORM(base_like_rsp, "r12", "rax", 1, 0)
FORM(base_like_rbp, "r13", "r15", 2, 0)
FORM(index_like_rsp, "r15", "r12", 4, 8)

void form_hint(const char *from, char *to, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm7" ::"r"(from), "r"(stride) : "memory");
  __asm__ volatile("tilestored %%tmm7, (%0,%1,1)" ::"r"(to), "r"(stride) : "memory");
}

/* Configurations that do not lie where a register points. */
static const uint8_t fixed[64] __attribute__((aligned(64))) = {[0] = 1, [16] = 12, [48] = 5};
static uint8_t kept[64] __attribute__((aligned(64)));

const uint8_t *config_relative(void) { /* relative to the next instruction: load `fixed`, return what is stored */
  __asm__ volatile("ldtilecfg %1\n sttilecfg %0" : "=m"(kept) : "m"(fixed));
  return kept;
}
void config_indexed(const uint8_t *config, int64_t quarter, uint8_t *out) { /* config + 4 * quarter + 3 */
  __asm__ volatile("ldtilecfg 3(%0,%1,4)" ::"r"(config), "r"(quarter) : "memory");
  sttilecfg(out);
}
void config_no_base(const uint8_t *config, uint8_t *out) {
  __asm__ volatile("ldtilecfg -5(,%0,1)" ::"r"(config + 5) : "memory");
  sttilecfg(out);
}
