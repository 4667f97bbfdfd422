// multi_lora_linear for a few rows (decoding), one launch for up to three layers with one x and gate:
//
//     y_i = x W_i^T + bias_i + ((x A_i^T) * gate[group]) B_i^T   x (M, K), W (N, K), A (R, K), B (N, R), gate (G, R); M <= 256
//
// bfloat16 or float16, float32 accumulation; h = x A^T stays in float32 until the gate has been applied and is then rounded
// to x's dtype, as the Triton kernels do. A gate_index outside [0, G) makes its row NaN; a zero gate row gives the bits that
// R = 0 gives.
//
// Floor. 2MNK + 2MR(N + K) FLOPs against 2NK + 2R(N + K) + 2M(K + N) bytes: M FLOPs a byte, so the bandwidth of the weight
// decides up to about 200 rows on an H200 (990 TFLOP/s, 4.8 TB/s by the datasheet), and up to fewer with mma.sync, which does
// not reach that rate there. 4096 x 4096 with R = 48: 34.3 MB, 8.0 us at 4.3 TB/s. Target: 80% of the bandwidth from 1 to 64
// rows for layers of 30 MB and more; of smaller ones, a token within twice the model's floor. NOT MEASURED: none of this has run on a GPU yet; it is compiled, disassembled and run in emulation (tests/kernels).
//
// Design. y^T = W x^T: W is the tensor cores' left operand, 16 of its rows at a time, so 1 to 8 rows of x cost one
// instruction and not 16 rows of padding. The contraction is cut into units of 128 rows of W by 64 of K; block b takes the
// b-th of `grid` equal ranges of all units in order (tile by tile, k within a tile), so every block reads the same number of
// bytes of W whatever N is. W and x stream through a ring of shared-memory stages filled by 16-byte cp.async (7 to 2 stages,
// 112 to 32 KB of W, in flight per SM). The units of A are dealt out the same way ahead of W's. What happens to h is hidden
// behind the stream of W:
//     units of A   -> sums of h, one per block that had part of a tile of A, to the workspace         arrive 1
//     W, first half                                                                                  wait 1
//     h: each block adds up its share of (M, R), in a fixed order, gates and rounds it -> s           arrive 2
//     W, second half; a tile of W that is all this block's: wait 2, add s B^T and bias, store y
//     a tile shared with other blocks: its sums to the workspace; arrive 3, wait 3; then each of those blocks adds the sums, in
//     the order of k, for its share of the tile and finishes that
// The rows of B are prefetched into L2 when their tile begins.
//
// Small layers. Where blocks have less than a tile each (grid > tiles), nothing hides a barrier, so that everything is exchanged
// at one: all units, A's and W's, are read; sums of h and of every tile go to the workspace; barrier; each block adds up what
// its share of its tiles needs, of h (into s, in shared memory) and of W. Where many rows make the sums of h long (above 48 KB a
// layer), s is dealt out as above, behind a second barrier.
//
// Several layers (query, key and value; gate and up) are one list of tiles, each with its layer's pointers: no weight is copied.
// Counted for R = 48 and up to 16 rows, in us, predicted from 4.3 TB/s, 3.3 for a cooperative launch in a graph, its first loads and
// its last stores, 1.2 for a barrier that nothing hides (three before, one now):
//                          Qwen2.5-0.5B, a layer of 24                  Qwen2.5-7B, a layer of 28
//                          launches   MB      before   now              launches   MB      before   now
//     query, key, value    3 -> 1     2.3     19       5.4              3 -> 1     34      20       12
//     output               1          1.8     6.5      5.0              1          26      10       10
//     gate, up             2 -> 1     18.3    15       8.6              2 -> 1     276     72       68
//     down                 1          9.3     7.5      6.7              1          138     36       36
//     all layers           7 -> 4     760     1.15 ms  0.62 ms          7 -> 4     13300   3.9 ms   3.5 ms
// (all layers at 4.3 TB/s: 0.18 ms and 3.1 ms). What is left at 0.5B are the launches and barriers of 96 calls.
//
// Other ways to one launch, by count. W_i stacked: the same launches, for a second copy of the weights (0.7 and 13 GB), or
// for modules whose weights are views of one storage, which .to(), loading and merging would have to keep; and a
// block-diagonal B is read three times. cuBLAS for x W^T below 5 MB: the product, x A^T, its gate and the sum are four
// launches of 2 us, and three products need the stacked weight. h by every block for itself, from L2: no barrier and no
// cooperative launch, predicted 3.2 us for query, key and value at K = 896 (86 KB of A a block, 1 us); at K = 4864 it is
// 467 KB, so that it would be a second kernel, with tiles of 16 rows of W. The measurements are to say whether it is worth one.
//
// The grid-wide barriers are those of cooperative groups: the driver provides their memory and its state, so the workspace
// may hold anything at entry and launches on different streams share nothing. A cooperative launch runs all its blocks at the
// same time or fails with an error; spinning in an ordinary launch could stop for good where two such kernels each got half
// of the GPU. The grid is at most one block per SM; that one fits is asked once per kernel and device, before its first
// launch. A cooperative launch can be captured into a CUDA graph.
//
// Bits. No atomics on floats; every sum has one order, given by N, K, R and the number of SMs: the same call gives the same
// bits, and a row's do not depend on the other rows nor on their number. W's ranges do not depend on R, so a zero gate is the
// frozen layer. This takes for granted that a tensor core computes every column of a product alike.
//
// Rejected, by reasoning and not by measurement: two launches (shrink; base and expand), since programmatic dependent launch
// begins with sm_90 and h would still wait for A; a last-block-done counter, which leaves the end of the work to one block
// and needs memory that is zero at entry; splitting K by a factor and not by ranges (4096 / 128 = 32 tiles fill 132 SMs in no
// whole number of waves); W straight into registers, which saves the trip through shared memory but ties bytes in flight to
// registers; wgmma and bulk copies, which serve one generation each and gain little where W's bandwidth is the limit. Of x,
// each block reads what its units need from L2: M / 128 of W's bytes.
#pragma once
#include <cstdint>

namespace clp::cuda {

enum class Half : int { bf16 = 0, f16 = 1 };

constexpr int kMaxRows = 256, kMaxLayers = 3;

// Last dimensions dense; a stride counts elements between rows. Any size may be 0 except groups where rank is not.
struct Layer {
  const void* weight;  // (n, k)
  const void* lora_a;  // (rank, k)
  const void* lora_b;  // (n, rank)
  const void* bias;    // (n,) or null
  void* y;             // (rows, n) dense
  int64_t stride_weight, stride_a, stride_b;
  int64_t n;
};
// Layers of one x, gate, k and rank: query, key and value; gate and up.
struct MultiLoraDecode {
  const void* x;           // (rows, k)
  const void* gate;        // (groups, rank) dense, float or x's dtype
  const void* gate_index;  // (rows,) int64 or int32, or null: row i takes gate row i / (rows / groups)
  void* workspace;         // multi_lora_decode_workspace() bytes, aligned to 256; contents on entry do not matter
  int64_t stride_x;
  int rows, k, rank, groups, layers;
  bool gate_is_float, index_is_64;
  Layer layer[kMaxLayers];
};

struct Device {
  int major, minor, sms, shared_per_block;
};

Device device_properties(int device);  // throws std::runtime_error where there is none
// n: of each of the layers.
int64_t multi_lora_decode_workspace(int rows, const int64_t* n, int layers, int k, int rank, int sms);
// On that device, which becomes the current one, and a stream of it. Asynchronous, allocates nothing, safe under stream
// capture; throws std::runtime_error. The first call of each size loads its kernel, which is better done before a capture.
void multi_lora_decode(const MultiLoraDecode& call, Half dtype, int device, int sms, void* stream);

}  // namespace clp::cuda
