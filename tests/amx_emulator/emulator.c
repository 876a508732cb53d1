/* Intel AMX by trap and emulation, for x86-64 Linux: on a CPU without tiles each of their instructions raises SIGILL.
 * The handler decodes it, executes it on tiles that it keeps for every thread, and steps over it. What a program
 * computes is then exactly what real tiles would compute; how long that takes says nothing.
 *
 * Loading this library (dlopen, or LD_PRELOAD) installs the handler; other illegal instructions go to the handler that
 * was there before. What real hardware refuses with #UD (no such shape, one tile twice, no configuration) stays an
 * illegal instruction. Semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. */
#define _GNU_SOURCE
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };

typedef struct { /* the operand of ldtilecfg, 64 bytes */
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Config;

typedef struct { /* what one thread's tiles hold; palette 0: nothing, and no tile may be used */
  Config config;
  uint8_t tile[TILES][ROWS][ROW_BYTES];
} State;

typedef enum { LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD,
               TDPBF16PS, KINDS, ILLEGAL = -1 } Kind;

static const char *const names[KINDS] = {"ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored",
                                         "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud", "tdpbf16ps"};

typedef struct {
  Kind kind;
  int reg, rm, vvvv;  /* the register fields of the encoding: destination, first source, second source */
  uint8_t *address;   /* of a memory operand without its index register */
  int64_t index;      /* index * scale: the distance of rows in tile loads and stores, part of the address elsewhere */
  int length;         /* bytes of the instruction */
} Instruction;

/* -- what tests ask ------------------------------------------------------------------------------------------------ */

static uint64_t counts[KINDS]; /* instructions executed, over all threads */

int amx_kinds(void) { return KINDS; }
const char *amx_name(int kind) { return names[kind]; }
uint64_t amx_count(int kind) { return __atomic_load_n(&counts[kind], __ATOMIC_RELAXED); }
void amx_reset(void) { for (int kind = 0; kind < KINDS; kind++) __atomic_store_n(&counts[kind], 0, __ATOMIC_RELAXED); }

/* -- a thread's tiles ---------------------------------------------------------------------------------------------- */

/* Mapped at the thread's first tile instruction: a signal handler may not allocate, and thread-local storage of a loaded
 * library has no room for 8 KiB. It stays mapped when the thread ends. */
static __thread State *state __attribute__((tls_model("initial-exec")));

static int map_state(void) {
  if (state) return 1;
  void *memory = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 0;
  state = memory;
  return 1;
}

static int usable(int tile) { return tile < TILES && state->config.palette && state->config.rows[tile]; }

static int configure(const uint8_t *from) {
  Config config;
  memcpy(&config, from, sizeof config);
  if (config.palette > 1) return 0;
  if (config.palette) {
    for (int i = 0; i < 14; i++) if (config.reserved[i]) return 0;
    for (int t = 0; t < 16; t++) {
      if (config.row_bytes[t] > ROW_BYTES || config.rows[t] > ROWS) return 0;
      if (!config.row_bytes[t] != !config.rows[t] || (t >= TILES && config.rows[t])) return 0;
    }
  }
  memset(state, 0, sizeof *state); /* a new configuration empties all tiles */
  if (config.palette) state->config = config;
  return 1;
}

static int move(int tile, uint8_t *memory, int64_t stride, int load) {
  if (!usable(tile)) return 0;
  if (load) memset(state->tile[tile], 0, sizeof state->tile[tile]);
  for (int r = 0; r < state->config.rows[tile]; r++) {
    uint8_t *row = memory + r * stride;
    if (load) memcpy(state->tile[tile][r], row, state->config.row_bytes[tile]);
    else memcpy(row, state->tile[tile][r], state->config.row_bytes[tile]);
  }
  return 1;
}

/* -- dot products: c[m][n] += sum over q of a[m][q] . b[q][n], where an element of a and b is four bytes ------------ */

static int dot_fits(int c, int a, int b) {
  const Config *f = &state->config;
  if (!usable(c) || !usable(a) || !usable(b) || a == b || a == c || b == c) return 0;
  if (f->row_bytes[a] % 4 || f->row_bytes[b] % 4 || f->row_bytes[c] % 4) return 0;
  return f->rows[a] == f->rows[c] && f->rows[b] == f->row_bytes[a] / 4 && f->row_bytes[b] == f->row_bytes[c];
}

static int32_t byte_dot(const uint8_t *a, const uint8_t *b, int a_signed, int b_signed) {
  int32_t sum = 0;
  for (int j = 0; j < 4; j++) sum += (a_signed ? (int8_t)a[j] : a[j]) * (b_signed ? (int8_t)b[j] : b[j]);
  return sum;
}

static int dot_bytes(int c, int a, int b, int a_signed, int b_signed) {
  if (!dot_fits(c, a, b)) return 0;
  const Config *f = &state->config;
  for (int m = 0; m < f->rows[c]; m++)
    for (int n = 0; n < f->row_bytes[c] / 4; n++) {
      uint32_t sum; /* wraps around, as the hardware's does */
      memcpy(&sum, &state->tile[c][m][4 * n], 4);
      for (int q = 0; q < f->rows[b]; q++)
        sum += (uint32_t)byte_dot(&state->tile[a][m][4 * q], &state->tile[b][q][4 * n], a_signed, b_signed);
      memcpy(&state->tile[c][m][4 * n], &sum, 4);
    }
  return 1;
}

static float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; } /* denormals count as zero */

static float bf16(const uint8_t *from) { /* the upper half of a float */
  uint8_t bytes[4] = {0, 0, from[0], from[1]};
  float x;
  memcpy(&x, bytes, 4);
  return flush(x);
}

static int dot_bf16(int c, int a, int b) { /* even and odd k in sums of their own, added to each other, then to c */
  if (!dot_fits(c, a, b)) return 0;
  const Config *f = &state->config;
  for (int m = 0; m < f->rows[c]; m++)
    for (int n = 0; n < f->row_bytes[c] / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int q = 0; q < f->rows[b]; q++) {
        const uint8_t *x = &state->tile[a][m][4 * q], *y = &state->tile[b][q][4 * n];
        even = flush(fmaf(bf16(x), bf16(y), even));
        odd = flush(fmaf(bf16(x + 2), bf16(y + 2), odd));
      }
      memcpy(&sum, &state->tile[c][m][4 * n], 4);
      sum = flush(flush(sum) + flush(even + odd));
      memcpy(&state->tile[c][m][4 * n], &sum, 4);
    }
  return 1;
}

/* -- decoding ------------------------------------------------------------------------------------------------------ */

static int64_t general(const ucontext_t *context, int number) { /* the general register of that number */
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[order[number]];
}

static int64_t displacement(const uint8_t **p, int bytes) {
  int32_t wide = 0;
  if (bytes == 1) wide = (int8_t)**p;
  if (bytes == 4) memcpy(&wide, *p, 4);
  *p += bytes;
  return wide;
}

/* Which instruction has this opcode, mandatory prefix (0 none, 1 66, 2 F3, 3 F2) and ModRM byte? */
static Kind kind_of(int opcode, int prefix, int modrm) {
  static const Kind by_prefix[4] = {TDPBUUD, TDPBUSD, TDPBSUD, TDPBSSD};
  int in_memory = modrm < 0xC0, sib = (modrm & 7) == 4, reg = modrm >> 3 & 7;
  switch (opcode) {
    case 0x49:
      if (in_memory) return reg ? ILLEGAL : prefix == 0 ? LDTILECFG : prefix == 1 ? STTILECFG : ILLEGAL;
      return prefix == 0 && modrm == 0xC0 ? TILERELEASE : prefix == 3 && !(modrm & 7) ? TILEZERO : ILLEGAL;
    case 0x4B: /* prefix 66: tileloaddt1, a load whose data is not expected to be used again */
      if (!in_memory || !sib) return ILLEGAL;
      return prefix == 3 || prefix == 1 ? TILELOADD : prefix == 2 ? TILESTORED : ILLEGAL;
    case 0x5C: return !in_memory && prefix == 2 ? TDPBF16PS : ILLEGAL;
    case 0x5E: return in_memory ? ILLEGAL : by_prefix[prefix];
    default: return ILLEGAL;
  }
}

/* Every tile instruction is C4 | R X B map | W vvvv L pp | opcode | ModRM | [SIB] | [displacement], R, X, B and vvvv
 * inverted, map 2, W and L zero. */
static Instruction decode(const ucontext_t *context) {
  const uint8_t *start = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP], *p = start + 5;
  Instruction it = {.kind = ILLEGAL};
  if (start[0] != 0xC4 || (start[1] & 31) != 2 || start[2] & 0x84) return it;
  int R = !(start[1] & 0x80), X = !(start[1] & 0x40), B = !(start[1] & 0x20);
  int modrm = start[4], mod = modrm >> 6;
  it.kind = kind_of(start[3], start[2] & 3, modrm);
  it.reg = (modrm >> 3 & 7) | R << 3;
  it.rm = (modrm & 7) | B << 3;
  it.vvvv = ~start[2] >> 3 & 15;
  if (mod != 3) {
    int64_t base = 0;
    int after_sib = -1, bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if ((modrm & 7) == 4) {
      int sib = *p++, number = (sib >> 3 & 7) | X << 3;
      after_sib = sib & 7;
      if (number != 4) it.index = (int64_t)((uint64_t)general(context, number) << (sib >> 6));
    }
    int no_base = mod == 0 && (after_sib < 0 ? modrm & 7 : after_sib) == 5;
    if (no_base) bytes = 4; /* after a SIB byte an absolute address, else one relative to the next instruction */
    else base = general(context, (after_sib < 0 ? modrm & 7 : after_sib) | B << 3);
    base += displacement(&p, bytes);
    if (no_base && after_sib < 0) base += (int64_t)p;
    it.address = (uint8_t *)base;
  }
  it.length = (int)(p - start);
  return it;
}

/* -- the trap ------------------------------------------------------------------------------------------------------ */

static int execute(const Instruction *it) {
  switch (it->kind) {
    case LDTILECFG: return configure(it->address + it->index);
    case STTILECFG: memcpy(it->address + it->index, &state->config, sizeof(Config)); return 1;
    case TILERELEASE: memset(state, 0, sizeof *state); return 1;
    case TILEZERO:
      if (!usable(it->reg)) return 0;
      memset(state->tile[it->reg], 0, sizeof state->tile[it->reg]);
      return 1;
    case TILELOADD: return move(it->reg, it->address, it->index, 1);
    case TILESTORED: return move(it->reg, it->address, it->index, 0);
    case TDPBSSD: return dot_bytes(it->reg, it->rm, it->vvvv, 1, 1);
    case TDPBSUD: return dot_bytes(it->reg, it->rm, it->vvvv, 1, 0);
    case TDPBUSD: return dot_bytes(it->reg, it->rm, it->vvvv, 0, 1);
    case TDPBUUD: return dot_bytes(it->reg, it->rm, it->vvvv, 0, 0);
    case TDPBF16PS: return dot_bf16(it->reg, it->rm, it->vvvv);
    default: return 0;
  }
}

static struct sigaction previous;

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
  ucontext_t *interrupted = context;
  Instruction it = decode(interrupted);
  if (it.kind != ILLEGAL && map_state() && execute(&it)) {
    __atomic_fetch_add(&counts[it.kind], 1, __ATOMIC_RELAXED);
    interrupted->uc_mcontext.gregs[REG_RIP] += it.length;
  } else if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(number, info, context);
  } else {
    if (it.kind != ILLEGAL) fprintf(stderr, "amx_emulator: %s is not legal here\n", names[it.kind]);
    sigaction(SIGILL, &previous, NULL); /* on return the instruction traps once more, without us */
  }
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGILL, &action, &previous);
}
