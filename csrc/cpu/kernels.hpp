// The CPU kernels as one table of function pointers per instruction set.
// Plain pointers and sizes only: nothing here knows torch or Python. Rows are row-major; a `stride` counts elements between rows.
#pragma once
#include <cstdint>

#include "decoder.hpp"
#include "instruction_sets.hpp"
#include "interpolation.hpp"
#include "matmul.hpp"
#include "multi_lora.hpp"
#include "prefix_attention.hpp"
#include "sampling.hpp"
#include "token_stats.hpp"

namespace clp {

enum class DType : int { f32 = 0, bf16 = 1 };

struct KernelTable {
  const char* name;
  // One entry per kernel family; see its header for the contract.
  DecoderKernels decoder;
  InterpolationKernels interpolation;
  MatmulKernels matmul;
  MultiLoraKernels multi_lora;
  PrefixAttentionKernels prefix_attention;
  SamplingKernels sampling;
  TokenStatsKernels token_stats;
};

const KernelTable& table();            // chosen at first use: CLP_KERNELS_ISA if set, else the widest this CPU runs
bool runs(const char* isa);            // whether this build and this processor have it; false for an unknown name
const char* select_isa(const char*);   // forces one; returns the name now in force; throws std::invalid_argument

CLP_IN_EACH_ISA(const KernelTable& table();)

}  // namespace clp
