// Runs CUDA kernels on the host, so that ASan, UBSan and TSan can watch them: a .cu without torch
// headers includes this instead of cuda_runtime.h when a C++ compiler takes it (`g++ -x c++`).
//
// Every thread of a block is a fiber with a stack of its own; they run in random order from barrier
// to barrier, blocks one after another. A barrier that some threads miss, threads at different
// barriers, and a shuffle whose mask and participants differ end the program with a message. TSan
// sees each fiber as a thread of its own, ordered by barriers and launches alone, so it reports
// races within a block and between blocks though nothing runs at the same time. Shared memory
// starts as NaN, with poisoned gaps under ASan. No PTX, no asynchronous copies, no timing.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() ::emulation::block_barrier(__LINE__)
#define __shfl_down_sync(mask, x, offset) ::emulation::shuffle_down(mask, x, offset)
#define SIMCLR_SHARED(type, name, count) \
  type* const name = static_cast<type*>(::emulation::shared(sizeof(type) * (count)))
#define SIMCLR_LAUNCH(kernel, grid, threads, stream, list) \
  ::emulation::launch(grid, threads, [&, copy = list] { kernel(copy); })
// The emulator's own bookkeeping is shared by all fibers on purpose.
#define EMULATION_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace emulation {

struct Index {
  unsigned x = 0;
};

constexpr int kMaxThreads = 1024;
constexpr int kMaxTsanFibers = 4096;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 16 * 1024;
constexpr size_t kGap = 64;

enum class State { running, at_block, at_warp, done };

struct Fiber {
  ucontext_t context;
  State state = State::done;
  int line = 0;  // of the barrier that it waits at
  size_t shared_used = 0;
  void* tsan = nullptr;
};

struct Block {
  Fiber fibers[kMaxThreads];
  ucontext_t scheduler;
  void* scheduler_tsan = nullptr;
  void* tsan_fibers[kMaxTsanFibers];
  int tsan_count = 0;
  int threads = 0, current = 0;
  char* memory = nullptr;  // [kSharedBytes + threads * kStackBytes]
  alignas(8) char shuffled[kMaxThreads][8];
  // TSan keeps one clock for every eight bytes.
  int64_t warp_sync[kMaxThreads / 32], block_sync = 0, launch_begin = 0, launch_end = 0;
  void (*call)(const void*) = nullptr;
  const void* kernel = nullptr;
  uint64_t random = 1;
};

inline Block block;
inline Index thread_index, block_index, grid_size;

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulation: %s (line %d, block %u, thread %u)\n", what, line, block_index.x,
               thread_index.x);
  std::exit(3);
}

EMULATION_UNSEEN inline void release(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(address);
#else
  (void)address;
#endif
}

EMULATION_UNSEEN inline void acquire(void* address) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(address);
#else
  (void)address;
#endif
}

EMULATION_UNSEEN inline void yield_at(State state, int line, void* sync) {
  Fiber& me = block.fibers[block.current];
  me.state = state;
  me.line = line;
  release(sync);
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block.scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&me.context, &block.scheduler);
  if (state != State::done) acquire(sync);
}

EMULATION_UNSEEN inline void block_barrier(int line) {
  yield_at(State::at_block, line, &block.block_sync);
}

template <typename T>
EMULATION_UNSEEN T shuffle_down(unsigned mask, T x, int offset) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
  const int lane = block.current % 32, warp = block.current / 32;
  if (!(mask >> lane & 1)) fail("a thread shuffles that its mask does not name", 0);
  if (mask != 0xffffffffu) fail("only full warps are shuffled here", 0);
  __builtin_memcpy(block.shuffled[block.current], &x, sizeof(T));
  yield_at(State::at_warp, 0, &block.warp_sync[warp]);
  T result = x;
  if (lane + offset < 32)
    __builtin_memcpy(&result, block.shuffled[block.current + offset], sizeof(T));
  yield_at(State::at_warp, 1, &block.warp_sync[warp]);
  return result;
}

EMULATION_UNSEEN inline void* shared(size_t bytes) {
  Fiber& me = block.fibers[block.current];
  char* address = block.memory + me.shared_used;
  me.shared_used += (bytes + 2 * kGap - 1) / kGap * kGap;
  if (me.shared_used > kSharedBytes) fail("too much shared memory", 0);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(address, bytes);
#endif
  return address;
}

EMULATION_UNSEEN inline void enter() {
  acquire(&block.launch_begin);
  block.call(block.kernel);
  yield_at(State::done, 0, &block.launch_end);
}

EMULATION_UNSEEN inline void resume(int i) {
  block.current = i;
  thread_index.x = static_cast<unsigned>(i);
  block.fibers[i].state = State::running;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(block.fibers[i].tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&block.scheduler, &block.fibers[i].context);
}

EMULATION_UNSEEN inline bool all_at(int begin, int end, State state, bool same_line) {
  for (int i = begin; i < end; ++i)
    if (block.fibers[i].state != state ||
        (same_line && block.fibers[i].line != block.fibers[begin].line))
      return false;
  return true;
}

// Runs the fibers begin..end-1 in random order, each to its next barrier.
EMULATION_UNSEEN inline void resume_range(int begin, int end) {
  int order[kMaxThreads];
  for (int i = begin; i < end; ++i) order[i - begin] = i;
  for (int n = end - begin; n > 0; --n) {
    block.random = block.random * 6364136223846793005u + 1442695040888963407u;
    const int pick = static_cast<int>((block.random >> 33) % static_cast<uint64_t>(n));
    const int fiber = order[pick];
    order[pick] = order[n - 1];
    resume(fiber);
  }
}

// Shared memory and stacks of a block. TSan would take their reuse by a later block, which nothing
// orders after this one, for a race: under it every block gets memory that no other has seen.
EMULATION_UNSEEN inline void new_memory(int threads) {
  const size_t bytes = kSharedBytes + static_cast<size_t>(threads) * kStackBytes;
#if !defined(__SANITIZE_THREAD__)
  if (block.memory == nullptr)
#endif
    block.memory = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (block.memory == MAP_FAILED) fail("no memory for a block", 0);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block.memory, bytes);
#endif
  for (size_t i = 0; i < kSharedBytes; ++i) block.memory[i] = static_cast<char>(0xff);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block.memory, kSharedBytes);
#endif
}

EMULATION_UNSEEN inline void run_block(int threads) {
  block.threads = threads;
  new_memory(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = block.memory + kSharedBytes + i * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = State::running;
    fiber.shared_used = kGap;
    makecontext(&fiber.context, enter, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
    if (block.tsan_count == kMaxTsanFibers) fail("too many blocks for TSan", 0);
    block.tsan_fibers[block.tsan_count++] = fiber.tsan;
#endif
  }
  resume_range(0, threads);
  for (;;) {
    if (all_at(0, threads, State::done, false)) break;
    bool progress = false;
    for (int w = 0; w < threads; w += 32)
      if (all_at(w, w + 32, State::at_warp, true)) {
        resume_range(w, w + 32);
        progress = true;
      }
    if (progress) continue;
    if (!all_at(0, threads, State::at_block, true))
      fail("threads of a block wait at different barriers, or some have ended", 0);
    resume_range(0, threads);
  }
}

template <typename Kernel>
EMULATION_UNSEEN void launch(unsigned grid, int threads, const Kernel& kernel) {
  if (threads % 32 != 0 || threads > kMaxThreads) fail("blocks have 32 to 1024 threads", 0);
  block.kernel = &kernel;
  block.call = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
  grid_size.x = grid;
#if defined(__SANITIZE_THREAD__)
  block.scheduler_tsan = __tsan_get_current_fiber();
#endif
  release(&block.launch_begin);
  for (unsigned b = 0; b < grid; ++b) {
    block_index.x = b;
    run_block(threads);
  }
  acquire(&block.launch_end);
#if defined(__SANITIZE_THREAD__)
  // Only now, because TSan does not report a race with a fiber that was destroyed.
  while (block.tsan_count > 0) __tsan_destroy_fiber(block.tsan_fibers[--block.tsan_count]);
#endif
}

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define gridDim ::emulation::grid_size

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline int cudaGetLastError() { return 0; }
