// The instruction sets that kernels are compiled for, each in a namespace of its name; a later one is preferred to an earlier one.
#pragma once

#define CLP_IN_EACH_ISA(...)                                                         \
  namespace portable { __VA_ARGS__ } namespace avx2 { __VA_ARGS__ } namespace avx512 { __VA_ARGS__ } \
  namespace avx512_bf16 { __VA_ARGS__ } namespace amx { __VA_ARGS__ }

namespace clp {
constexpr const char* kInstructionSets[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
}
