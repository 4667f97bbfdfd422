// Picks the instruction set once: CLP_KERNELS_ISA if it is set, else the widest one this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

#ifdef CLP_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace clp {
namespace {

#ifdef CLP_HAVE_AMX
// The processor has the tiles, and the kernel lets this process use them: their registers are large enough that it must ask.
bool amx_permitted() {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, avx512_bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & avx512_bf16)) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

const KernelTable* find(const std::string& name) {
  if (name == "portable") return &portable::table();
#ifdef CLP_HAVE_X86
  const bool avx2_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_ok = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2_ok ? &avx2::table() : nullptr;
  if (name == "avx512") return avx512_ok ? &avx512::table() : nullptr;
#ifdef CLP_HAVE_AMX
  if (name == "amx") return avx512_ok && amx_permitted() ? &amx::table() : nullptr;
#endif
#endif
  for (const char* known : {"avx2", "avx512", "amx"})
    if (name == known) return nullptr;
  throw std::invalid_argument("instruction set '" + name + "' is unknown; expected portable, avx2, avx512 or amx");
}

const KernelTable* initial() {
  if (const char* forced = std::getenv("CLP_KERNELS_ISA"); forced && *forced) {
    if (const KernelTable* t = find(forced)) return t;
    throw std::invalid_argument(std::string("CLP_KERNELS_ISA=") + forced + ": this processor cannot run it; unset it or use portable");
  }
  for (const char* name : {"amx", "avx512", "avx2"})
    if (const KernelTable* t = find(name)) return t;
  return &portable::table();
}

const KernelTable*& current() {
  static const KernelTable* t = initial();
  return t;
}

}  // namespace

const KernelTable& table() { return *current(); }

const char* select_isa(const char* name) {
  const KernelTable* t = find(name);
  if (!t) throw std::invalid_argument(std::string("this processor cannot run the '") + name + "' kernels");
  current() = t;
  return t->name;
}

}  // namespace clp
