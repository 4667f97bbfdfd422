// csrc/cuda/intrinsics.cuh on a CPU: runs a kernel as it is written, one fiber per CUDA thread, switched where threads wait
// for each other.
//
// What is modelled: blocks that all run at the same time; barriers of a block and of the grid; instructions of a whole warp
// (mma, ldmatrix, shuffles), with the fragment layouts of the PTX manual; cp.async, whose 16 bytes are NaN from the moment it
// is issued until the group it is in has been waited for; shared memory that starts as NaN. What stops the program with a
// message: threads that wait for ever, a warp whose lanes are at different instructions, addresses that the hardware would
// refuse, ldmatrix rows that share a bank. Compiled with -fsanitize=thread, every fiber is a thread to the sanitizer and only
// barriers order them, so it reports races between CUDA threads. What is not modelled: time, caches, and memory that becomes
// visible late.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#endif

#define CLP_KERNEL(threads) void
#define CLP_PARAMETER const
#define CLP_DEVICE inline
#define CLP_BOTH inline
#define CLP_UNROLL
#define CLP_UNROLL_BY(count)

namespace clp::cuda {

struct Bf16 {};
struct F16 {};

namespace emulated {

constexpr int kWarp = 32;

[[noreturn]] inline void stop(const char* what, int block, int thread) {
  std::fprintf(stderr, "emulated kernel, block %d, thread %d: %s\n", block, thread, what);
  std::fflush(stderr);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Block;

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done = false;
  const char* waits = "start";
  std::deque<Copy> copies;
  int groups = 0;
  std::unique_ptr<char[]> stack;
  void* sanitizer = nullptr;
};

struct Warp {
  const char* what = nullptr;
  int arrived = 0;
  void* arguments[kWarp];
  Fiber* waiting[kWarp];
};

struct Block {
  int index;
  std::vector<char> memory;  // shared memory is the 128-byte aligned part
  char* shared;
  size_t shared_bytes;
  std::vector<Warp> warps;
  std::vector<Fiber> threads;
  std::vector<Fiber*> waiting;  // at the barrier
};

struct Launch {
  std::function<void()> kernel;
  std::vector<Block> blocks;
  std::deque<Fiber*> ready;
  std::vector<Fiber*> grid_waiting;
  uint32_t grid_arrived = 0, grid_generation = 0;
  Fiber main{};
  Fiber* current = nullptr;
  std::minstd_rand random;
  char grid_barrier = 0;  // has an address
};

inline Launch* launch_now = nullptr;

// The emulation's own state is no part of the kernel: hidden from the thread sanitizer.
struct Hidden {
#if defined(__SANITIZE_THREAD__)
  Hidden() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Hidden() { end(); }
  static void end() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#else
  Hidden() {}
#endif
};

inline void released(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
  (void)at;
}
inline void acquired(void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
  (void)at;
}
inline void reads(const void* at, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_read_range(const_cast<void*>(at), bytes);
#endif
  (void)at, (void)bytes;
}
inline void writes(void* at, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(at, bytes);
#endif
  (void)at, (void)bytes;
}

constexpr size_t kStack =
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    1 << 18;
#else
    1 << 16;
#endif

inline Fiber& self() { return *launch_now->current; }

inline void switch_to(Fiber* next, bool finished = false) {
  Hidden hidden;
  Launch& launch = *launch_now;
  Fiber* const from = launch.current;
  if (next == from) return;
  launch.current = next;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(finished ? nullptr : &fake, next->stack.get(), next->stack ? kStack : 0);
#endif
  swapcontext(&from->context, &next->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  (void)finished;
}

// To the next fiber that can run; to the launch, which looks why, where there is none.
inline void wait(const char* what, bool finished = false) {
  Hidden hidden;
  Launch& launch = *launch_now;
  launch.current->waits = what;
  Fiber* next = &launch.main;
  if (!launch.ready.empty()) next = launch.ready.front(), launch.ready.pop_front();
  switch_to(next, finished);
}

inline void wake(std::vector<Fiber*>& waiting) {
  Launch& launch = *launch_now;
  // Warps go on in an order that changes.
  const size_t count = waiting.size(), start = count ? launch.random() % count : 0;
  for (size_t i = 0; i < count; ++i) launch.ready.push_back(waiting[(start + i) % count]);
  waiting.clear();
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  Launch& launch = *launch_now;
  acquired(&launch);
  launch.kernel();
  released(&launch);
  Hidden hidden;
  self().done = true;
  wait("end", true);
}

// Runs kernel() in `blocks` blocks of `threads`, all at the same time. `order` seeds the order in which warps go on.
inline void run(int blocks, int threads, size_t shared_bytes, unsigned order, std::function<void()> kernel) {
  Launch launch;
  launch_now = &launch;
  launch.current = &launch.main;
  launch.kernel = std::move(kernel);
  launch.random.seed(order + 1);
  launch.blocks.resize(blocks);
#if defined(__SANITIZE_THREAD__)
  launch.main.sanitizer = __tsan_get_current_fiber();
#endif
  for (Block& block : launch.blocks) {
    block.index = int(&block - launch.blocks.data());
    block.memory.assign(shared_bytes + 128, char(0xff));
    block.shared = block.memory.data() + (128 - reinterpret_cast<uintptr_t>(block.memory.data()) % 128);
    block.shared_bytes = shared_bytes;
    block.warps.resize((threads + kWarp - 1) / kWarp);
    block.threads = std::vector<Fiber>(threads);
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = block.threads[t];
      fiber.block = &block;
      fiber.thread = t;
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, entry, 0);
#if defined(__SANITIZE_THREAD__)
      fiber.sanitizer = __tsan_create_fiber(0);
#endif
    }
  }
  std::vector<Fiber*> all;
  for (Block& block : launch.blocks)
    for (Fiber& fiber : block.threads) all.push_back(&fiber);
  wake(all);
  released(&launch);
  void* const main_thread = launch.main.sanitizer;
  (void)main_thread;
  while (!launch.ready.empty()) wait("launch");
  acquired(&launch);
  for (Block& block : launch.blocks)
    for (Fiber& fiber : block.threads) {
      if (!fiber.done) stop((std::string("waits for ever at ") + fiber.waits).c_str(), block.index, fiber.thread);
#if defined(__SANITIZE_THREAD__)
      __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
      for (int level = 0; level < 3; ++level) Hidden::end();  // it stopped within entry, wait and switch_to
      __tsan_switch_to_fiber(main_thread, __tsan_switch_to_fiber_no_sync);
      __tsan_destroy_fiber(fiber.sanitizer);
#endif
    }
  launch_now = nullptr;
}

// An instruction of the whole warp: the last lane to arrive does it for all. arguments: this lane's.
template <class F>
void together(const char* what, void* arguments, F&& all_lanes) {
  Hidden hidden;
  Fiber& fiber = self();
  Warp& warp = fiber.block->warps[fiber.thread / kWarp];
  if (warp.arrived && warp.what != what)
    stop("lanes of one warp are at different instructions", fiber.block->index, fiber.thread);
  warp.what = what;
  warp.arguments[fiber.thread % kWarp] = arguments;
  warp.waiting[warp.arrived++] = &fiber;
  if (warp.arrived < kWarp) return wait(what);
  all_lanes(warp.arguments);
  warp.arrived = 0;
  for (int lane = 0; lane < kWarp - 1; ++lane) launch_now->ready.push_back(warp.waiting[lane]);
}

inline float widened_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                     : std::ldexp(float(mantissa), -24);
  return bits >> 15 ? -value : value;
}

inline const float* table_f16() {
  static const std::vector<float> table = [] {
    std::vector<float> t(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) t[i] = widened_f16(uint16_t(i));
    return t;
  }();
  return table.data();
}

inline void check(bool fine, const char* what) {
  if (!fine) stop(what, self().block->index, self().thread);
}
inline bool aligned(const void* at, int bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }
inline bool in_shared(const void* at, size_t bytes) {
  const Block& block = *self().block;
  const char* const from = static_cast<const char*>(at);
  return from >= block.shared && from + bytes <= block.shared + block.shared_bytes;
}

}  // namespace emulated

template <class T>
float widen(uint16_t bits);
template <>
inline float widen<Bf16>(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
template <>
inline float widen<F16>(uint16_t bits) { return emulated::table_f16()[bits]; }

template <class T>
uint16_t narrow(float value);
template <>
inline uint16_t narrow<Bf16>(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (value != value) return 0x7fff;
  return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
template <>
inline uint16_t narrow<F16>(float value) {
  if (value != value) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size >= 65520.f) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);  // size < 2^exponent
  const int unit = (exponent < -13 ? -13 : exponent) - 11;  // of the last place
  const int steps = int(std::nearbyint(std::ldexp(size, -unit)));
  // A mantissa that rounds up to 2048 carries into the exponent, as it should.
  return sign | uint16_t(unit == -24 ? steps : ((unit + 24) << 10) + steps);
}

inline int thread_index() { return emulated::self().thread; }
inline int block_index() { return emulated::self().block->index; }
inline char* shared_memory() { return emulated::self().block->shared; }

inline void sync_threads() {
  using namespace emulated;
  Block& block = *self().block;
  released(&block);
  {
    Hidden hidden;
    if (block.waiting.size() + 1 < block.threads.size()) {
      block.waiting.push_back(&self());
      wait("sync_threads");
    } else {
      wake(block.waiting);
    }
  }
  acquired(&block);
}

inline uint32_t grid_arrive() {
  using namespace emulated;
  Launch& launch = *launch_now;
  sync_threads();
  if (thread_index()) return 0;
  released(&launch.grid_barrier);
  Hidden hidden;
  const uint32_t generation = launch.grid_generation;
  if (++launch.grid_arrived == launch.blocks.size()) {
    launch.grid_arrived = 0, ++launch.grid_generation;
    wake(launch.grid_waiting);
  }
  return generation;
}
inline void grid_wait(uint32_t token) {
  using namespace emulated;
  Launch& launch = *launch_now;
  if (!thread_index()) {
    {
      Hidden hidden;
      if (launch.grid_generation == token) {
        launch.grid_waiting.push_back(&self());
        wait("grid_wait");
      }
    }
    acquired(&launch.grid_barrier);
  }
  sync_threads();
}

inline void copy_async(void* shared, const void* global, int bytes) {
  using namespace emulated;
  check(aligned(shared, 16) && in_shared(shared, 16), "cp.async to an address that is not aligned or not in shared memory");
  check(aligned(global, 16), "cp.async from an address that is not a multiple of 16");
  check(bytes >= 0 && bytes <= 16, "cp.async of more than 16 bytes");
  writes(shared, 16);
  Hidden hidden;
  std::memset(shared, 0xff, 16);
  self().copies.push_back({shared, global, bytes, self().groups});
}
inline void copy_commit() { ++emulated::self().groups; }
template <int PENDING>
void copy_wait() {
  using namespace emulated;
  Fiber& fiber = self();
  for (;;) {
    Copy copy;
    {
      Hidden hidden;
      if (fiber.copies.empty() || fiber.copies.front().group >= fiber.groups - PENDING) return;
      copy = fiber.copies.front();
      fiber.copies.pop_front();
    }
    writes(copy.to, 16);
    Hidden hidden;
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

inline void store_shared(void* shared, const uint32_t (&words)[4]) {
  using namespace emulated;
  check(aligned(shared, 16) && in_shared(shared, 16), "16-byte store to an address not aligned or not in shared memory");
  writes(shared, 16);
  Hidden hidden;
  std::memcpy(shared, words, 16);
}

template <int COUNT>
void load_matrices(uint32_t (&r)[COUNT], const void* row) {
  using namespace emulated;
  struct Lane {
    uint32_t* r;
    const char* row;
  } lane{r, static_cast<const char*>(row)};
  if (thread_index() % kWarp < COUNT * 8) {
    check(aligned(row, 16) && in_shared(row, 16), "ldmatrix from an address that is not aligned or not in shared memory");
    reads(row, 16);
  }
  together(COUNT == 4 ? "ldmatrix.x4" : "ldmatrix.x2", &lane, [](void** lanes) {
    for (int matrix = 0; matrix < COUNT; ++matrix) {
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const char* const from = static_cast<Lane*>(lanes[matrix * 8 + i])->row;
        banks |= 1u << reinterpret_cast<uintptr_t>(from) / 16 % 8;
        for (int t = 0; t < 4; ++t) std::memcpy(&static_cast<Lane*>(lanes[i * 4 + t])->r[matrix], from + t * 4, 4);
      }
      check(banks == 0xff, "rows of an ldmatrix share a bank");
    }
  });
}

// Sums in float64, rounded once; the hardware's own order within the 16 products is not documented.
template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulated;
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
  } lane{c, a, {b0, b1}};
  together("mma", &lane, [](void** lanes) {
    static float left[16][16], right[8][16];
    for (int l = 0; l < kWarp; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      const int group = l / 4, two = l % 4 * 2;
      for (int high = 0; high < 2; ++high) {
        for (int i = 0; i < 4; ++i)
          left[group + i % 2 * 8][two + i / 2 * 8 + high] = widen<T>(uint16_t(lane.a[i] >> high * 16));
        for (int i = 0; i < 2; ++i) right[group][two + i * 8 + high] = widen<T>(uint16_t(lane.b[i] >> high * 16));
      }
    }
    for (int l = 0; l < kWarp; ++l) {
      float* const c = static_cast<Lane*>(lanes[l])->c;
      for (int i = 0; i < 4; ++i) {
        const float* const row = left[l / 4 + i / 2 * 8];
        const float* const column = right[l % 4 * 2 + i % 2];
        double sum = c[i];
        for (int k = 0; k < 16; ++k) sum += double(row[k]) * column[k];
        c[i] = float(sum);
      }
    }
  });
}

inline float shuffle_xor(float value, int mask) {
  using namespace emulated;
  struct Lane {
    float value, got;
    int mask;
  } lane{value, 0, mask};
  together("shuffle", &lane, [](void** lanes) {
    for (int l = 0; l < kWarp; ++l)
      static_cast<Lane*>(lanes[l])->got = static_cast<Lane*>(lanes[l ^ static_cast<Lane*>(lanes[l])->mask])->value;
  });
  Hidden hidden;
  return lane.got;
}

template <class T>
T load_constant(const T* at) {
  emulated::check(emulated::aligned(at, sizeof(T)), "load from an address that is not aligned");
  return *at;
}
template <class T>
T load_l2(const T* at) { return load_constant(at); }
inline void load_l2(float (&to)[4], const float* at) {
  emulated::check(emulated::aligned(at, 16), "16-byte load from an address that is not aligned");
  for (int i = 0; i < 4; ++i) to[i] = at[i];
}
template <class T>
void store_l2(T* at, T value) { *at = value; }
inline void store_l2(float* at, const float (&value)[4]) {
  emulated::check(emulated::aligned(at, 16), "16-byte store to an address that is not aligned");
  for (int i = 0; i < 4; ++i) at[i] = value[i];
}
inline void prefetch_l2(const void*) {}

}  // namespace clp::cuda
