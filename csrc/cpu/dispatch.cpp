// Picks the instruction set once: CLP_KERNELS_ISA if it is set, else the widest one this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

#ifdef CLP_HAVE_X86
#include <cpuid.h>
#endif

#ifdef CLP_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace clp {
namespace {

#ifdef CLP_HAVE_X86
// Asked directly: compilers know "avx512bf16" by name since GCC 12 alone.
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}
#endif

#ifdef CLP_HAVE_AMX
// The processor has the tiles, and the kernel lets this process use them: their registers are large enough that it must ask.
bool amx_permitted() {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile)) return false;
  if (!has_avx512_bf16()) return false;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

// Null where this build or this processor does not have it.
const KernelTable* find(const std::string& name) {
  if (name == "portable") return &portable::table();
#ifdef CLP_HAVE_X86
  const bool avx2_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_ok = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2" && avx2_ok) return &avx2::table();
  if (name == "avx512" && avx512_ok) return &avx512::table();
#ifdef CLP_HAVE_AVX512_BF16
  if (name == "avx512_bf16" && avx512_ok && has_avx512_bf16()) return &avx512_bf16::table();
#endif
#ifdef CLP_HAVE_AMX
  if (name == "amx" && avx512_ok && amx_permitted()) return &amx::table();
#endif
#endif
  return nullptr;
}

const KernelTable* wanted(const std::string& name, const std::string& what) {
  if (const KernelTable* t = find(name)) return t;
  std::string names, have;
  bool known = false;
  for (const char* isa : kInstructionSets) {
    known |= name == isa;
    (names += names.empty() ? "" : ", ") += isa;
    if (find(isa)) (have += have.empty() ? "" : ", ") += isa;
  }
  throw std::invalid_argument(what + (known ? ": this processor, or this build, does not have it; here are " + have
                                            : ": unknown instruction set; expected one of " + names));
}

const KernelTable* initial() {
  if (const char* forced = std::getenv("CLP_KERNELS_ISA"); forced && *forced)
    return wanted(forced, std::string("CLP_KERNELS_ISA=") + forced);
  const KernelTable* best = nullptr;
  for (const char* isa : kInstructionSets)
    if (const KernelTable* t = find(isa)) best = t;
  return best;
}

const KernelTable*& current() {
  static const KernelTable* t = initial();
  return t;
}

}  // namespace

const KernelTable& table() { return *current(); }

bool runs(const char* isa) { return find(isa) != nullptr; }

const char* select_isa(const char* name) {
  current() = wanted(name, std::string("select_isa('") + name + "')");
  return current()->name;
}

}  // namespace clp
