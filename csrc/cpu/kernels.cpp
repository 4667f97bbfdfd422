// Compiled once per instruction set with CLP_ISA = portable | avx2 | avx512 | avx512_bf16 | amx.
#include "kernels.hpp"

#define CLP_STR2(x) #x
#define CLP_STR(x) CLP_STR2(x)

namespace clp::CLP_ISA {

const KernelTable& table() {
  static const KernelTable t = {CLP_STR(CLP_ISA),         decoder_kernels,  interpolation_kernels, matmul_kernels, multi_lora_kernels,
                                prefix_attention_kernels, sampling_kernels, token_stats_kernels};
  return t;
}

}  // namespace clp::CLP_ISA
