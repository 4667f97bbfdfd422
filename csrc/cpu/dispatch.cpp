// Picks the instruction set once: CLP_KERNELS_ISA if it is set, else the widest one this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace clp {
namespace {

const KernelTable* find(const std::string& name) {
  if (name == "portable") return &portable::table();
#ifdef CLP_HAVE_X86
  const bool avx2_ok = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_ok = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2_ok ? &avx2::table() : nullptr;
  if (name == "avx512") return avx512_ok ? &avx512::table() : nullptr;
#else
  if (name == "avx2" || name == "avx512") return nullptr;
#endif
  throw std::invalid_argument("instruction set '" + name + "' is unknown; expected portable, avx2 or avx512");
}

const KernelTable* initial() {
  if (const char* forced = std::getenv("CLP_KERNELS_ISA"); forced && *forced) {
    if (const KernelTable* t = find(forced)) return t;
    throw std::invalid_argument(std::string("CLP_KERNELS_ISA=") + forced + ": this processor cannot run it; unset it or use portable");
  }
  for (const char* name : {"avx512", "avx2"})
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
