// LARS on CUDA: two launches for all tensors of a list, every parameter group among them.
//
// A block computes one chunk of kChunk elements of one tensor.
//   norms:   squares[chunk] = {Σp², Σ(s·g)²}, or {Σp², Σ(s·g + λp)²}; reads p and g.
//   update:  adds its tensor's squares in a fixed order, takes the factors of lars.h from them, and
//            updates p and v; reads p, g, v, writes p, v.
// Seven arrays of traffic, of which the last-level cache saves what it can hold. Fixed slots and
// fixed orders instead of atomics: the same bits on every run. The list of tensors travels in the
// kernel's arguments and lr, grad_scale and found_inf stay on the device: no copy to or from the
// host, no synchronisation, capturable in a graph.
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define SIMCLR_SHARED(type, name, count) __shared__ type name[count]
#define SIMCLR_LAUNCH(kernel, grid, threads, stream, list) \
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(list)
#else
#include "host_emulation/cuda.h"
#endif

#include "lars_cuda.h"

namespace simclr {
namespace {

#ifdef __CUDACC__
constexpr int kThreads = 512;
#else
constexpr int kThreads = 64;
#endif
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 128 * kThreads;  // 65536
constexpr unsigned kAllLanes = 0xffffffffu;

// The arguments of a kernel may have 32764 bytes since CUDA 12.1, and 4096 before.
// Fewer on the host, where the tests fill more than one list.
#ifndef __CUDACC__
constexpr int kMaxTensors = 24;
constexpr int kMaxGroups = 3;
constexpr int kMaxBytes = 4096;
#elif CUDART_VERSION < 12010
constexpr int kMaxTensors = 80;
constexpr int kMaxGroups = 8;
constexpr int kMaxBytes = 4096;
#else
constexpr int kMaxTensors = 768;
constexpr int kMaxGroups = 32;
constexpr int kMaxBytes = 32764;
#endif

struct List {
  void* p[kMaxTensors];
  const void* g[kMaxTensors];
  void* v[kMaxTensors];
  int64_t n[kMaxTensors];
  LarsGroup groups[kMaxGroups];
  const double* rates[kMaxGroups];
  const float* grad_scale;
  const float* found_inf;
  double* squares;                 // [chunks, 2]
  int32_t first[kMaxTensors + 1];  // number of each tensor's first chunk
  int32_t tensors;
  uint8_t group[kMaxTensors];
};
static_assert(sizeof(List) <= kMaxBytes, "a List must fit into the arguments of a kernel");

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, double* out) { *out = x; }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// What one thread loads and stores at a time.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

__device__ inline bool aligned(const void* a, const void* b, const void* c) {
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                    reinterpret_cast<uintptr_t>(c);
  return bits % 16 == 0;
}

// The tensor of a chunk: the last whose first chunk is not beyond it.
__device__ inline int find_tensor(const List& list, int chunk) {
  int low = 0, high = list.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first[middle] <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

__device__ inline bool skipped(const List& list) {
  return list.found_inf != nullptr && *list.found_inf != 0.0f;
}

__device__ inline double inverse_scale(const List& list) {
  return list.grad_scale != nullptr ? 1.0 / static_cast<double>(*list.grad_scale) : 1.0;
}

// The sum of x over the block, in thread 0; the shared memory may be reused after it.
__device__ inline double block_sum(double x, double* shared) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(kAllLanes, x, offset);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < kWarps ? shared[lane] : 0.0;
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(kAllLanes, x, offset);
  }
  __syncthreads();
  return x;
}

template <typename A>
struct Squares {
  A p, g;

  template <bool kJoint>
  __device__ inline void add(A weight, A gradient, A scale, A decay) {
    gradient *= scale;
    // Without decay an infinite weight must not enter as 0·inf.
    if (kJoint && decay != A(0)) gradient += decay * weight;
    p += weight * weight;
    g += gradient * gradient;
  }
};

// This thread's part of a chunk of n elements, accumulated in A.
template <typename A, bool kJoint, typename T>
__device__ inline Squares<A> thread_squares(const T* p, const T* g, int n, double scale,
                                            double decay) {
  constexpr int kSize = Pack<T>::kSize;
  Squares<A> sums = {0, 0};
  const A s = static_cast<A>(scale), d = static_cast<A>(decay);
  const int packs = aligned(p, g, nullptr) ? n / kSize : 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    const Pack<T> a = reinterpret_cast<const Pack<T>*>(p)[i];
    const Pack<T> b = reinterpret_cast<const Pack<T>*>(g)[i];
#pragma unroll
    for (int k = 0; k < kSize; ++k)
      sums.template add<kJoint>(static_cast<A>(widen(a.x[k])), static_cast<A>(widen(b.x[k])), s, d);
  }
  for (int i = packs * kSize + threadIdx.x; i < n; i += kThreads)
    sums.template add<kJoint>(static_cast<A>(widen(p[i])), static_cast<A>(widen(g[i])), s, d);
  return sums;
}

// Whether a float32 sum of 128 squares is so far within float32's range that no square overflowed,
// and those that underflowed do not count.
__device__ inline bool in_range(float x) { return x > 1e-25f && x < 1e37f; }
__device__ inline bool in_range(double) { return true; }

template <bool kJoint, typename T>
__device__ inline Squares<double> chunk_squares(const T* p, const T* g, int n, double scale,
                                                double decay) {
  using A = typename Wide<T>::type;
  const Squares<A> sums = thread_squares<A, kJoint>(p, g, n, scale, decay);
  if (in_range(sums.p) && in_range(sums.g)) return {sums.p, sums.g};
  return thread_squares<double, kJoint>(p, g, n, scale, decay);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) lars_norms(const __grid_constant__ List list) {
  SIMCLR_SHARED(double, shared, kWarps);
  if (skipped(list)) return;
  const int chunk = blockIdx.x;
  const int t = find_tensor(list, chunk);
  const LarsGroup& group = list.groups[list.group[t]];
  if (!(group.flags & lars_adapt)) return;
  const int64_t begin = static_cast<int64_t>(chunk - list.first[t]) * kChunk;
  const int64_t left = list.n[t] - begin;
  const int n = left < kChunk ? static_cast<int>(left) : kChunk;
  const T* p = static_cast<const T*>(list.p[t]) + begin;
  const T* g = static_cast<const T*>(list.g[t]) + begin;
  const double scale = (group.flags & lars_maximize) ? -inverse_scale(list) : inverse_scale(list);
  const Squares<double> mine = (group.flags & lars_joint_norm)
                                   ? chunk_squares<true>(p, g, n, scale, group.weight_decay)
                                   : chunk_squares<false>(p, g, n, scale, group.weight_decay);
  const double p_sum = block_sum(mine.p, shared);
  const double g_sum = block_sum(mine.g, shared);
  if (threadIdx.x == 0) {
    list.squares[2 * static_cast<int64_t>(chunk)] = p_sum;
    list.squares[2 * static_cast<int64_t>(chunk) + 1] = g_sum;
  }
}

template <typename A>
struct Factors {
  A grad, decay, into, momentum, out;
};

template <bool kMomentum, bool kNesterov, typename A, typename T>
__device__ inline void update_one(T* p, T g, T* v, const Factors<A>& f) {
  const A weight = widen(*p);
  A d = f.grad * widen(g);
  if (f.decay != A(0)) d += f.decay * weight;
  d *= f.into;
  A u = d;
  if (kMomentum) {
    const A next = f.momentum * widen(*v) + d;
    narrow(next, v);
    u = kNesterov ? f.momentum * next + d : next;
  }
  narrow(weight - f.out * u, p);
}

template <bool kMomentum, bool kNesterov, typename A, typename T>
__device__ inline void update_chunk(T* p, const T* g, T* v, int n, const Factors<A>& f) {
  constexpr int kSize = Pack<T>::kSize;
  const int packs = aligned(p, g, v) ? n / kSize : 0;
#pragma unroll 2
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T> a = reinterpret_cast<const Pack<T>*>(p)[i];
    const Pack<T> b = reinterpret_cast<const Pack<T>*>(g)[i];
    Pack<T> c = a;
    if (kMomentum) c = reinterpret_cast<const Pack<T>*>(v)[i];
#pragma unroll
    for (int k = 0; k < kSize; ++k) update_one<kMomentum, kNesterov>(&a.x[k], b.x[k], &c.x[k], f);
    reinterpret_cast<Pack<T>*>(p)[i] = a;
    if (kMomentum) reinterpret_cast<Pack<T>*>(v)[i] = c;
  }
  for (int i = packs * kSize + threadIdx.x; i < n; i += kThreads)
    update_one<kMomentum, kNesterov>(p + i, g[i], kMomentum ? v + i : nullptr, f);
}

// Two blocks per processor: left to itself the compiler aims at three on sm_86 and 89, and spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) lars_update(const __grid_constant__ List list) {
  using A = typename Wide<T>::type;
  SIMCLR_SHARED(double, shared, kWarps);
  SIMCLR_SHARED(Factors<A>, factors, 1);
  if (skipped(list)) return;
  // Backwards: the chunks whose norms were taken last are still in the cache.
  const int chunk = gridDim.x - 1 - blockIdx.x;
  const int t = find_tensor(list, chunk);
  const LarsGroup& group = list.groups[list.group[t]];
  double p_sum = 0.0, g_sum = 0.0;
  if (group.flags & lars_adapt) {
    for (int c = list.first[t] + threadIdx.x; c < list.first[t + 1]; c += kThreads) {
      p_sum += list.squares[2 * static_cast<int64_t>(c)];
      g_sum += list.squares[2 * static_cast<int64_t>(c) + 1];
    }
    p_sum = block_sum(p_sum, shared);
    g_sum = block_sum(g_sum, shared);
  }
  if (threadIdx.x == 0) {
    const double* rate = list.rates[list.group[t]];
    // The squares are those of the scaled gradient.
    LarsFactors f = lars_factors(group, rate != nullptr ? *rate : group.lr, 1.0, p_sum, g_sum);
    f.grad *= inverse_scale(list);
    factors[0] = {static_cast<A>(f.grad), static_cast<A>(f.decay), static_cast<A>(f.into),
                  static_cast<A>(f.momentum), static_cast<A>(f.out)};
  }
  __syncthreads();
  const Factors<A> f = factors[0];
  const int64_t begin = static_cast<int64_t>(chunk - list.first[t]) * kChunk;
  const int64_t left = list.n[t] - begin;
  const int n = left < kChunk ? static_cast<int>(left) : kChunk;
  T* p = static_cast<T*>(list.p[t]) + begin;
  const T* g = static_cast<const T*>(list.g[t]) + begin;
  if (list.v[t] == nullptr) {
    update_chunk<false, false>(p, g, static_cast<T*>(nullptr), n, f);
    return;
  }
  T* v = static_cast<T*>(list.v[t]) + begin;
  if (group.flags & lars_nesterov)
    update_chunk<true, true>(p, g, v, n, f);
  else
    update_chunk<true, false>(p, g, v, n, f);
}

int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

template <typename T>
int launch(const List& list, void* stream) {
  const unsigned grid = static_cast<unsigned>(list.first[list.tensors]);
  bool adapts = false;
  for (int t = 0; t < list.tensors; ++t)
    adapts = adapts || (list.groups[list.group[t]].flags & lars_adapt);
  if (adapts) SIMCLR_LAUNCH(lars_norms<T>, grid, kThreads, stream, list);
  SIMCLR_LAUNCH(lars_update<T>, grid, kThreads, stream, list);
  return static_cast<int>(cudaGetLastError());
}

int launch(LarsType type, const List& list, void* stream) {
  if (list.tensors == 0) return 0;
  switch (type) {
    case LarsType::f32:
      return launch<float>(list, stream);
    case LarsType::f64:
      return launch<double>(list, stream);
    case LarsType::f16:
      return launch<__half>(list, stream);
    case LarsType::bf16:
      return launch<__nv_bfloat16>(list, stream);
  }
  return 0;
}

}  // namespace

int64_t lars_cuda_workspace(const LarsTensor* tensors, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(tensors[i].n);
  return 2 * chunks;
}

int lars_cuda_step(const LarsTensor* tensors, int64_t count, const LarsGroup* groups,
                   int64_t group_count, const double* const* rates, const float* grad_scale,
                   const float* found_inf, double* workspace, void* stream) {
  for (LarsType type : {LarsType::f32, LarsType::f64, LarsType::f16, LarsType::bf16}) {
    List list = {};
    int used_groups = 0;
    int64_t last_group = -1;
    const auto flush = [&] {
      const int error = launch(type, list, stream);
      workspace += 2 * static_cast<int64_t>(list.first[list.tensors]);
      list.tensors = used_groups = 0;
      last_group = -1;
      return error;
    };
    list.grad_scale = grad_scale;
    list.found_inf = found_inf;
    for (int64_t i = 0; i < count; ++i) {
      const LarsTensor& tensor = tensors[i];
      if (tensor.type != type) continue;
      const int64_t end = list.first[list.tensors] + chunks_of(tensor.n);
      const bool new_group = tensor.group != last_group;
      if (list.tensors == kMaxTensors || (new_group && used_groups == kMaxGroups) ||
          (list.tensors > 0 && end > INT32_MAX)) {
        if (const int error = flush()) return error;
      }
      list.squares = workspace;
      if (tensor.group != last_group) {
        last_group = tensor.group;
        list.groups[used_groups] = groups[last_group];
        list.rates[used_groups++] = rates != nullptr ? rates[last_group] : nullptr;
      }
      const int t = list.tensors++;
      list.p[t] = tensor.p;
      list.g[t] = tensor.g;
      list.v[t] = tensor.v;
      list.n[t] = tensor.n;
      list.group[t] = static_cast<uint8_t>(used_groups - 1);
      list.first[t + 1] = list.first[t] + static_cast<int32_t>(chunks_of(tensor.n));
    }
    if (const int error = flush()) return error;
  }
  return 0;
}

}  // namespace simclr
