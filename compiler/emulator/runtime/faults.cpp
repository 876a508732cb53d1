// Accesses are judged before they happen, but a thread that writes beyond its own variables may lose its way, and runs
// into memory that is not there. What the system would end this process for ends the launch alone.
#include <pthread.h>
#include <signal.h>

#include <cstring>

#include "state.h"

namespace emu {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static struct sigaction before[4];
static stack_t stack_before;
static char own_stack[64 << 10];  // that of a thread may be full
static pthread_t launching;

static void crashed(int number, siginfo_t* info, void* context) {
  if (const Thread* self = pthread_equal(launching, pthread_self()) ? block.self : nullptr) {
    if (size_t((const char*)info->si_addr - self->stack) < kGuard)
      fail(name_of(*self) + " has more variables than the " + std::to_string(kStack >> 10) + " KiB of its stack hold");
    auto pc = (const char*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
    fail(name_of(*self) + " is lost, after a write beyond its own variables perhaps: " + strsignal(number), pc + 1);
  }
  for (int i = 0; i < 4; ++i)
    if (kSignals[i] == number) sigaction(number, &before[i], nullptr);  // comes again, to whom it concerns
}

Guarded::Guarded() {
  launching = pthread_self();
  stack_t own{};
  own.ss_sp = own_stack, own.ss_size = sizeof own_stack;
  sigaltstack(&own, &stack_before);
  struct sigaction action {};
  action.sa_sigaction = crashed;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // it is left by a jump
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before[i]);
}

Guarded::~Guarded() {
  for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
}

}  // namespace emu
