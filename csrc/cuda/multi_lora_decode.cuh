// The kernel of multi_lora_decode.hpp, which has the contract and the design.
#pragma once
#include "intrinsics.cuh"
#include "multi_lora_decode.hpp"

namespace clp::cuda {

constexpr int kTile = 128;      // rows of W (or A) in a unit
constexpr int kDepth = 64;      // of K in a unit: 128 bytes a row, eight 16-byte chunks
constexpr int kThreads = 256;   // eight warps, on one tile
constexpr int kLeastUnits = 4;  // a block has at least: below that, what is exchanged is a large part of what is read
constexpr int kSumsAlone = 12288;  // floats that a block reads for itself, 48 KB: about what a barrier takes

CLP_BOTH int divide_up(int a, int b) { return (a + b - 1) / b; }

// `total` units in `parts` ranges, part p from first(p) to first(p + 1), each at least one unit long.
struct Ranges {
  int total, parts;
  CLP_BOTH int first(int part) const { return int(uint64_t(total) * part / parts); }
  CLP_BOTH int part_of(int unit) const { return int(((uint64_t(unit) + 1) * parts + total - 1) / total - 1); }
};

// Who does what. Nothing here depends on the number of rows, and nothing about W on the rank: see Bits in the contract.
// Tiles are those of the first layer, then those of the second, ...
struct Plan {
  int grid, steps, tiles_w, tiles_a;
  CLP_BOTH Plan(int tiles_w, int layers, int k, int rank, int sms)
      : steps(k > 0 ? divide_up(k, kDepth) : 1), tiles_w(tiles_w), tiles_a(layers * divide_up(rank, kTile)) {
    const int most = tiles_w * steps / kLeastUnits;
    grid = most < 1 ? 1 : most < sms ? most : sms;
  }
  CLP_BOTH Plan(const MultiLoraDecode& call, int sms) : Plan(tiles_of(call), call.layers, call.k, call.rank, sms) {}
  CLP_BOTH static int tiles_of(const MultiLoraDecode& call) {
    int tiles = 0;
    for (int i = 0; i < call.layers; ++i) tiles += divide_up(int(call.layer[i].n), kTile);
    return tiles;
  }
  CLP_BOTH Ranges w() const { return {tiles_w * steps, grid}; }
  CLP_BOTH Ranges a() const { return {tiles_a * steps, tiles_a * steps < grid ? tiles_a * steps : grid}; }
  CLP_BOTH bool shares_tiles() const { return steps > 1 && tiles_w % grid != 0; }
  // A block has no more than a tile's units, of two tiles at most: everything is exchanged at once, when all was read.
  CLP_BOTH bool exchanges_once() const { return shares_tiles() && grid > tiles_w; }
  // At most so many blocks have part of one tile of A.
  CLP_BOTH int most_sums() const {
    const int most = tiles_a ? divide_up(a().parts, tiles_a) + 1 : 0;
    return most < a().parts ? most : a().parts;
  }
};

// The workspace; sizes in bytes, each a multiple of 256.
struct Workspace {
  int64_t sums, gated, parked;  // sums of h (most_sums, layers, rows, rank) float; s (layers, rows, rank) padded; sums of tiles
  int64_t total;
  CLP_BOTH Workspace(const Plan& plan, int rows_padded, int rows, int layers, int rank) {
    const int64_t rank_padded = divide_up(rank, 16) * 16;
    sums = 0;
    gated = sums + up(int64_t(4) * plan.most_sums() * layers * rows * rank);
    parked = gated + up(2 * layers * rows_padded * rank_padded);
    total = parked + (plan.shares_tiles() ? int64_t(4) * 2 * plan.grid * kTile * rows_padded : 0);
  }
  CLP_BOTH static int64_t up(int64_t bytes) { return (bytes + 255) / 256 * 256; }
};

// COLUMNS: rows of x in blocks of 8, the columns of the tensor cores' result. ALIGNED: x, W and A may be read 16 bytes at a
// time.
template <class T, int COLUMNS, bool ALIGNED>
struct MultiLoraDecodeKernel {
  static constexpr int kWarpsM = COLUMNS >= 32 ? 4 : COLUMNS >= 8 ? 2 : 1, kWarpsN = kThreads / 32 / kWarpsM;
  // Blocks of 16 (rows of W) and of 8 (rows of x) that a warp has.
  static constexpr int kBlocksN = kTile / 16 / kWarpsN, kBlocksM = COLUMNS / kWarpsM, kBlocks = kBlocksN * kBlocksM;
  static constexpr int kRows = COLUMNS * 8;
  static constexpr int kStageW = kTile * kDepth * 2, kStage = kStageW + kRows * kDepth * 2;
  // 160 KB at most; an A100 has 163.
  static constexpr int kStages = COLUMNS <= 4 ? 8 : COLUMNS <= 8 ? 6 : COLUMNS <= 16 ? 5 : 3;
  static constexpr int kSharedBytes = kStage * kStages;
  using Accumulator = float[kBlocksN][kBlocksM][4];
  static_assert(kBlocks <= 32, "a share is a word of bits");

  const MultiLoraDecode& call;
  const Plan plan;
  const int thread = thread_index(), block = block_index(), lane = thread % 32;
  const int warp_n = thread / 32 % kWarpsN * kBlocksN * 16, warp_m = thread / 32 / kWarpsN * kBlocksM * 8;
  const int rank_padded = divide_up(call.rank, 16) * 16;
  const Workspace at{plan, kRows, call.rows, call.layers, call.rank};

  CLP_DEVICE MultiLoraDecodeKernel(const MultiLoraDecode& call, int sms) : call(call), plan(call, sms) {}

  // A tile's layer, and its number among that layer's tiles.
  struct Tile {
    int layer, number;
  };
  CLP_DEVICE Tile tile_w(int tile) const {
    int layer = 0;
    for (; layer + 1 < call.layers; ++layer) {
      const int tiles = divide_up(int(call.layer[layer].n), kTile);
      if (tile < tiles) break;
      tile -= tiles;
    }
    return {layer, tile};
  }
  CLP_DEVICE Tile tile_a(int tile) const {
    const int tiles = divide_up(call.rank, kTile);
    return {tile / tiles, tile % tiles};
  }

  CLP_DEVICE float* sums() const { return reinterpret_cast<float*>(static_cast<char*>(call.workspace) + at.sums); }
  CLP_DEVICE uint16_t* gated() const { return reinterpret_cast<uint16_t*>(static_cast<char*>(call.workspace) + at.gated); }
  CLP_DEVICE float* parked(int slot) const {
    return reinterpret_cast<float*>(static_cast<char*>(call.workspace) + at.parked) + int64_t(slot) * kTile * kRows;
  }

  // ---- the stream of units: this block's of A, then its of W ----

  struct Position {
    int tile, step;
  };
  Position fill{};        // the next unit to be fetched
  int fills = 0;          // units fetched
  int used = 0;           // units multiplied
  int of_a = 0, all = 0;  // units of A, and altogether

  // Chunk c of row r lies at c ^ (r % 8), so that neither filling nor ldmatrix meets a bank twice.
  CLP_DEVICE static int swizzled(int row, int chunk) { return row * (kDepth * 2) + ((chunk ^ (row & 7)) << 4); }

  // ROWS rows from `first` of (limit, k): a thread has one chunk of every 32nd row, at the same k and the same place among
  // the banks.
  template <int ROWS>
  CLP_DEVICE void fill_rows(char* to, const void* from, int64_t stride, int first, int limit, int step) const {
    constexpr int kApart = kThreads / 8;
    const int row = thread / 8, k = step * kDepth + thread % 8 * 8;
    const int left = call.k - k, there = left < 0 ? 0 : left > 8 ? 8 : left;
    const uint16_t* const base = static_cast<const uint16_t*>(from);
    const uint16_t* const column = base + (first + row) * stride + k;
    char* const target = to + swizzled(row, thread % 8);
    CLP_UNROLL_BY((ALIGNED ? 8 : 4) / (kBlocks > 16 ? 4 : 1))
    for (int i = 0; i < (ROWS + kApart - 1) / kApart; ++i) {
      if (ROWS % kApart && row >= ROWS) break;
      const int valid = first + row + i * kApart < limit ? there : 0;
      const uint16_t* const source = valid ? column + i * kApart * stride : base;
      char* const target_i = target + i * kApart * kDepth * 2;
      if constexpr (ALIGNED) {
        copy_async(target_i, source, valid * 2);
      } else {
        uint32_t words[4];
        CLP_UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t low = 2 * j < valid ? load_constant(source + 2 * j) : 0;
          const uint32_t high = 2 * j + 1 < valid ? load_constant(source + 2 * j + 1) : 0;
          words[j] = low | high << 16;
        }
        store_shared(target_i, words);
      }
    }
  }

  CLP_DEVICE void fetch() {
    if (fills < all) {
      const bool is_a = fills < of_a;
      char* const stage = shared_memory() + fills % kStages * kStage;
      const Tile tile = is_a ? tile_a(fill.tile) : tile_w(fill.tile);
      const Layer& of = call.layer[tile.layer];
      fill_rows<kTile>(stage, is_a ? of.lora_a : of.weight, is_a ? of.stride_a : of.stride_weight, tile.number * kTile,
                       is_a ? call.rank : int(of.n), fill.step);
      fill_rows<kRows>(stage + kStageW, call.x, call.stride_x, 0, call.rows, fill.step);
      ++fills;
      if (++fill.step == plan.steps) ++fill.tile, fill.step = 0;
      if (fills == of_a) fill = position(plan.w().first(block));
    }
    copy_commit();
  }

  CLP_DEVICE Position position(int unit) const { return {unit / plan.steps, unit % plan.steps}; }

  // acc += this unit's rows of W times x. Every thread of the block.
  CLP_DEVICE void multiply_next(Accumulator& acc) {
    copy_wait<kStages - 2>();
    sync_threads();  // the unit is there, and nobody still reads the stage that is filled next
    fetch();
    const char* const stage = shared_memory() + used % kStages * kStage;
    CLP_UNROLL_BY(kBlocks > 16 ? 1 : 4)  // the registers of 32 blocks leave no room for the next 16 of k
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t w[kBlocksN][4];
      CLP_UNROLL
      for (int i = 0; i < kBlocksN; ++i) load_matrices(w[i], stage + swizzled(warp_n + i * 16 + lane % 16, k * 2 + lane / 16));
      if constexpr (kBlocksM == 1) {
        uint32_t x[2];
        load_matrices(x, stage + kStageW + swizzled(warp_m + lane % 8, k * 2 + lane / 8 % 2));
        CLP_UNROLL
        for (int i = 0; i < kBlocksN; ++i) mma<T>(acc[i][0], w[i], x[0], x[1]);
      } else {
        CLP_UNROLL
        for (int j = 0; j < kBlocksM; j += 2) {
          uint32_t x[4];
          load_matrices(x, stage + kStageW + swizzled(warp_m + j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
          CLP_UNROLL
          for (int i = 0; i < kBlocksN; ++i) {
            mma<T>(acc[i][j], w[i], x[0], x[1]);
            mma<T>(acc[i][j + 1], w[i], x[2], x[3]);
          }
        }
      }
    }
    ++used;
  }

  CLP_DEVICE static void clear(Accumulator& acc) {
    CLP_UNROLL
    for (int i = 0; i < kBlocksN; ++i)
      CLP_UNROLL
      for (int j = 0; j < kBlocksM; ++j)
        CLP_UNROLL
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;
  }

  // Element e of block (i, j): its row of W within the tile, and its row of x.
  CLP_DEVICE int row_n(int i, int e) const { return warp_n + i * 16 + lane / 4 + e / 2 * 8; }
  CLP_DEVICE int row_m(int j, int e) const { return warp_m + j * 8 + lane % 4 * 2 + e % 2; }

  // ---- h ----

  // The sums of h that the block `part`, of those with part of a tile, has for a layer.
  CLP_DEVICE float* sums_of(int part, int layer) const {
    return sums() + (int64_t(part) * call.layers + layer) * call.rows * call.rank;
  }

  CLP_DEVICE void store_sums(const Accumulator& acc, int tile) const {
    const Tile of = tile_a(tile);
    float* const to = sums_of(block - plan.a().part_of(tile * plan.steps), of.layer);
    CLP_UNROLL
    for (int i = 0; i < kBlocksN; ++i)
      CLP_UNROLL
      for (int j = 0; j < kBlocksM; ++j)
        CLP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int r = of.number * kTile + row_n(i, e), m = row_m(j, e);
          if (r < call.rank && m < call.rows) store_l2(to + int64_t(m) * call.rank + r, acc[i][j][e]);
        }
  }

  CLP_DEVICE float gate_of(int m, int r) const {
    int64_t group = m;
    if (call.gate_index)
      group = call.index_is_64 ? static_cast<const int64_t*>(call.gate_index)[m]
                               : static_cast<const int32_t*>(call.gate_index)[m];
    else if (call.groups != call.rows)
      group = m / (call.rows / call.groups);
    if (group < 0 || group >= call.groups) return widen<Bf16>(0x7fc0);  // NaN
    const int64_t i = group * call.rank + r;
    return call.gate_is_float ? static_cast<const float*>(call.gate)[i] : widen<T>(static_cast<const uint16_t*>(call.gate)[i]);
  }

  // Elements [first, last) of s (layers, rows, rank) = (sum of the sums of h) * gate, zeros in the padding; store(element, s).
  // Eight lanes to an element: sums lane, lane + 8, ...
  template <class F>
  CLP_DEVICE void gate_elements(int first, int last, F&& store) const {
    constexpr int kTogether = kThreads / 8;
    const Ranges a = plan.a();
    for (int start = first; start < last; start += kTogether) {
      const int element = start + thread / 8, row = element / rank_padded, r = element % rank_padded;
      const int layer = row / kRows, m = row % kRows;
      const bool real = element < last && m < call.rows && r < call.rank;
      float sum = 0;
      if (real) {
        const int unit = (layer * divide_up(call.rank, kTile) + r / kTile) * plan.steps;
        const int parts = a.part_of(unit + plan.steps - 1) - a.part_of(unit) + 1;
        const float* const from = sums_of(0, layer) + int64_t(m) * call.rank + r;
        const int64_t apart = int64_t(call.layers) * call.rows * call.rank;
        CLP_UNROLL_BY(4)
        for (int part = lane % 8; part < parts; part += 8) sum += load_l2(from + part * apart);
      }
      for (int far = 4; far; far /= 2) sum += shuffle_xor(sum, far);
      if (lane % 8 == 0 && element < last) store(element, real ? narrow<T>(sum * gate_of(m, r)) : uint16_t(0));
    }
  }
  // This block's share of s, to the workspace.
  CLP_DEVICE void gate_share() const {
    const Ranges shares{call.layers * kRows * rank_padded, plan.grid};
    gate_elements(shares.first(block), shares.first(block + 1),
                  [&](int element, uint16_t s) { store_l2(gated() + element, s); });
  }

  // Where few sums make up s, each block adds up what it needs, for itself, which spares everybody a barrier.
  CLP_DEVICE bool gates_alone() const {
    return call.rows * call.rank * plan.most_sums() <= kSumsAlone && kRows * rank_padded * 2 <= kSharedBytes;
  }
  // s of a layer, to shared memory, of which the stream of units has no more need. Every thread of the block.
  CLP_DEVICE void gate_alone(int layer) const {
    uint16_t* const to = reinterpret_cast<uint16_t*>(shared_memory());
    const int first = layer * kRows * rank_padded;
    sync_threads();  // nobody reads the last unit, or another layer's s
    gate_elements(first, first + kRows * rank_padded, [&](int element, uint16_t s) { to[element - first] = s; });
    sync_threads();
  }

  // ---- y ----

  CLP_DEVICE void prefetch_b(int tile) const {
    const Tile at = tile_w(tile);
    const Layer& of = call.layer[at.layer];
    const int n = at.number * kTile + thread;
    if (thread >= kTile || n >= of.n) return;
    const char* const row = static_cast<const char*>(of.lora_b) + n * of.stride_b * 2;
    for (int byte = 0; byte < call.rank * 2; byte += 128) prefetch_l2(row + byte);
  }

  // Two neighbours of a row of B, zero outside.
  CLP_DEVICE uint32_t pair_of_b(const Layer& of, int n, int r, bool by_word) const {
    if (n >= of.n || r >= call.rank) return 0;
    const uint16_t* const from = static_cast<const uint16_t*>(of.lora_b) + n * of.stride_b + r;
    if (by_word) return load_constant(reinterpret_cast<const uint32_t*>(from));
    return load_constant(from) | (r + 1 < call.rank ? uint32_t(load_constant(from + 1)) << 16 : 0);
  }

  // y = acc + s B^T + bias, for this block's share of the tile: bit i * kBlocksM + j stands for acc[i][j]. alone: s lies in
  // shared memory.
  CLP_DEVICE void finish(Accumulator& acc, Tile tile, uint32_t share, bool alone) const {
    const Layer& of = call.layer[tile.layer];
    const int first = tile.number * kTile;
    const bool by_word = (reinterpret_cast<uintptr_t>(of.lora_b) % 4 | of.stride_b % 2 | call.rank % 2) == 0;
    const uint16_t* const s_alone = reinterpret_cast<const uint16_t*>(shared_memory());
    const uint16_t* const s_shared = gated() + int64_t(tile.layer) * kRows * rank_padded;
    for (int r = 0; r < rank_padded; r += 16) {
      uint32_t b[kBlocksN][4];
      CLP_UNROLL
      for (int i = 0; i < kBlocksN; ++i)
        CLP_UNROLL
        for (int e = 0; e < 4; ++e)
          b[i][e] = pair_of_b(of, first + warp_n + i * 16 + lane / 4 + e % 2 * 8, r + lane % 4 * 2 + e / 2 * 8, by_word);
      CLP_UNROLL
      for (int j = 0; j < kBlocksM; ++j) {
        const int s = (warp_m + j * 8 + lane / 4) * rank_padded + r + lane % 4 * 2;
        const auto pair = [&](int at) {
          return alone ? *reinterpret_cast<const uint32_t*>(s_alone + at)
                       : load_l2(reinterpret_cast<const uint32_t*>(s_shared + at));
        };
        const uint32_t low = pair(s), high = pair(s + 8);
        CLP_UNROLL
        for (int i = 0; i < kBlocksN; ++i)
          if (share >> (i * kBlocksM + j) & 1) mma<T>(acc[i][j], b[i], low, high);
      }
    }
    uint16_t* const y = static_cast<uint16_t*>(of.y);
    const uint16_t* const bias = static_cast<const uint16_t*>(of.bias);
    CLP_UNROLL
    for (int i = 0; i < kBlocksN; ++i)
      CLP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int n = first + row_n(i, half * 2);
        if (n >= of.n) continue;
        const float add = bias ? widen<T>(load_constant(bias + n)) : 0.f;
        CLP_UNROLL
        for (int j = 0; j < kBlocksM; ++j)
          CLP_UNROLL
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            const int m = row_m(j, e);
            if (m < call.rows && share >> (i * kBlocksM + j) & 1)
              y[int64_t(m) * of.n + n] = narrow<T>(bias ? acc[i][j][e] + add : acc[i][j][e]);
          }
      }
  }

  // Sums of a shared tile, block of the result by block: in the order in which the threads hold them.
  CLP_DEVICE void park(const Accumulator& acc, int slot) const {
    CLP_UNROLL
    for (int i = 0; i < kBlocksN; ++i)
      CLP_UNROLL
      for (int j = 0; j < kBlocksM; ++j) store_l2(parked(slot) + ((i * kBlocksM + j) * kThreads + thread) * 4, acc[i][j]);
  }

  // A block's last tile begins in it, and its first began in another: a slot for each.
  CLP_DEVICE static int slot_of(int block, bool begins) { return block * 2 + begins; }

  // acc = all blocks' sums of a shared tile, added up, for this block's share of it, which is returned: of n blocks that
  // share the tile, the i-th has bits i, i + n, ...
  CLP_DEVICE uint32_t load_shared(Accumulator& acc, int tile) const {
    const Ranges w = plan.w();
    const int first = w.part_of(tile * plan.steps), sharing = w.part_of((tile + 1) * plan.steps - 1) - first + 1;
    constexpr int kAhead = kBlocks <= 4 ? 4 : kBlocks <= 8 ? 2 : 1;  // of the blocks sharing: loads on their way
    uint32_t share = 0;
    for (int bit = block - first; bit < kBlocks; bit += sharing) share |= 1u << bit;
    clear(acc);
    CLP_UNROLL_BY(kAhead)
    for (int other = 0; other < sharing; ++other) {
      const float* const from = parked(slot_of(first + other, other == 0)) + thread * 4;
      CLP_UNROLL
      for (int i = 0; i < kBlocksN; ++i)
        CLP_UNROLL
        for (int j = 0; j < kBlocksM; ++j) {
          const int number = i * kBlocksM + j;
          if (!(share >> number & 1)) continue;
          float more[4];
          load_l2(more, from + number * kThreads * 4);
          CLP_UNROLL
          for (int e = 0; e < 4; ++e) acc[i][j][e] += more[e];
        }
    }
    return share;
  }

  // ---- all of it ----

  // One loop over the block's tiles, of A, then of W, then those of W shared with other blocks: each piece of code is there
  // once.
  CLP_DEVICE void run() {
    const Ranges a = plan.a(), w = plan.w();
    const int steps = plan.steps, w_first = w.first(block), of_w = w.first(block + 1) - w_first;
    const int a_first = block < a.parts ? a.first(block) : 0;
    of_a = block < a.parts ? a.first(block + 1) - a_first : 0, all = of_a + of_w;
    fill = position(of_a ? a_first : w_first);
    for (int stage = 0; stage < kStages - 1; ++stage) fetch();

    const bool adapters = call.rank > 0, once = plan.exchanges_once(), alone = once && adapters && gates_alone();
    int gated_layer = -1;  // whose s lies in shared memory
    // Before the end of the first tile that is all this block's, which needs s.
    const int half = of_a + (of_w < steps ? of_w : steps) / 2;
    uint32_t token = 0;
    bool waiting = adapters && !once, exchanged = false;
    int shared_tile = w_first / steps;  // the next that may be
    Accumulator acc;
    for (;;) {
      int tile;
      uint32_t share = ~0u;
      if (used < all) {
        const bool is_a = used < of_a;
        const Position at = position(is_a ? a_first + used : w_first + used - of_a);
        const int left = (is_a ? of_a : all) - used, end = used + (steps - at.step < left ? steps - at.step : left);
        const bool whole = end - used == steps;
        tile = at.tile;
        if (adapters && !is_a) prefetch_b(tile);
        clear(acc);
        while (used < end) {
          if (waiting && used == of_a) token = grid_arrive();
          if (waiting && used == half) {
            grid_wait(token);
            gate_share();
            token = grid_arrive();
          }
          multiply_next(acc);
        }
        if (is_a) store_sums(acc, tile);
        else if (once || !whole) park(acc, slot_of(block, at.step == 0));
        if (is_a || once || !whole) continue;
      } else {
        if (!plan.shares_tiles()) return;
        const int last = (w_first + of_w - 1) / steps;
        for (; shared_tile <= last; ++shared_tile)
          if (once || shared_tile * steps < w_first || (shared_tile + 1) * steps > w_first + of_w) break;
        if (shared_tile > last && exchanged) return;
        if (!exchanged) {
          if (waiting) grid_wait(token);
          waiting = false, exchanged = true;
          grid_wait(grid_arrive());
          if (once && adapters && !alone) {
            gate_share();
            grid_wait(grid_arrive());
          }
          if (shared_tile > last) return;
        }
        tile = shared_tile++;
        share = load_shared(acc, tile);
      }
      if (waiting) grid_wait(token);
      waiting = false;
      const Tile of = tile_w(tile);
      if (alone && share && of.layer != gated_layer) gate_alone(gated_layer = of.layer);
      finish(acc, of, share, alone);
    }
  }
};

template <class T, int COLUMNS, bool ALIGNED>
CLP_KERNEL(kThreads) multi_lora_decode_kernel(CLP_PARAMETER MultiLoraDecode call, CLP_PARAMETER int sms) {
  MultiLoraDecodeKernel<T, COLUMNS, ALIGNED>(call, sms).run();
}

inline bool is_aligned(const MultiLoraDecode& call) {
  const auto fits = [](const void* at, int64_t stride) { return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride % 8 == 0; };
  bool all = fits(call.x, call.stride_x);
  for (int i = 0; i < call.layers; ++i)
    all = all && fits(call.layer[i].weight, call.layer[i].stride_weight) &&
          (!call.rank || fits(call.layer[i].lora_a, call.layer[i].stride_a));
  return all;
}

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};

// Operands that are not aligned are rare, and have fewer sizes.
constexpr int columns_for(int rows, bool aligned) {
  for (int columns : {1, 2, 4, 8, 16, 32})
    if (rows <= columns * 8 && (aligned || columns == 2 || columns == 8 || columns == 32)) return columns;
  return 0;
}

// f(Constant<COLUMNS>, Constant<ALIGNED>) for the kernel that serves the call.
template <class F>
void with_kernel(const MultiLoraDecode& call, F&& f) {
  const bool aligned = is_aligned(call);
  switch (columns_for(call.rows, aligned) * 2 + aligned) {
    case 1 * 2 + 1: return f(Constant<1>{}, Constant<1>{});
    case 2 * 2 + 1: return f(Constant<2>{}, Constant<1>{});
    case 4 * 2 + 1: return f(Constant<4>{}, Constant<1>{});
    case 8 * 2 + 1: return f(Constant<8>{}, Constant<1>{});
    case 16 * 2 + 1: return f(Constant<16>{}, Constant<1>{});
    case 32 * 2 + 1: return f(Constant<32>{}, Constant<1>{});
    case 2 * 2: return f(Constant<2>{}, Constant<0>{});
    case 8 * 2: return f(Constant<8>{}, Constant<0>{});
    case 32 * 2: return f(Constant<32>{}, Constant<0>{});
  }
}

// Enough for either alignment.
inline int64_t workspace_bytes(int rows, const int64_t* n, int layers, int k, int rank, int sms) {
  int tiles = 0;
  for (int i = 0; i < layers; ++i) tiles += divide_up(int(n[i]), kTile);
  return Workspace(Plan(tiles, layers, k, rank, sms), columns_for(rows, false) * 8, rows, layers, rank).total;
}

}  // namespace clp::cuda
