// What the programs that run kernels without torch share: threads, and memory that tells of faults.
#pragma once

#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/nt_xent.h"

inline void run_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t worker = 1; worker < count; ++worker) threads.emplace_back(body, context, worker);
  if (count) body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

struct Memory {
  std::vector<void*> owned;
  ~Memory() {
    for (void* block : owned) std::free(block);
  }
  // Exactly the size that is asked for, so that a sanitizer sees accesses beyond it; filled with
  // NaN.
  simclr::Workspace workspace() {
    return {this, [](void* self, int64_t bytes) {
              void* block = nullptr;
              if (posix_memalign(&block, 64, size_t(bytes ? bytes : 1))) std::abort();
              std::memset(block, 0xff, size_t(bytes));
              static_cast<Memory*>(self)->owned.push_back(block);
              return block;
            }};
  }
};
