// simclr_fast::lars_ on the CPU: the whole optimizer step in one parallel region without barriers.
//
// Threads take items from one list, in order.
//   - A tensor of at most kOwned elements is one item; several tiny ones share an item. Its thread
//     computes the norms and then updates the tensor, while it is in that core's cache.
//   - A larger tensor has an item per piece of kPiece elements. A thread computes the norms of the
//     piece and puts the piece on its own stack. As soon as all norms of the tensor are known,
//     threads update the pieces on their stacks, the newest first, which is in their cache.
// A thread that finds no more items updates pieces of other threads. So threads hardly ever wait,
// and an interrupted thread delays no other.
// Sums are taken per piece and added in order. So the result depends neither on the number of
// threads nor on which thread did what.
#include <atomic>
#include <cmath>
#include <deque>
#include <memory>
#include <thread>

#include "lars_binding.h"

namespace simclr {
namespace {

constexpr int64_t kPiece = 1 << 16;
constexpr int64_t kOwned = 1 << 17;
// Tiny tensors share an item up to this many elements. No thread is started for fewer.
constexpr int64_t kGrain = 1 << 15;

// The tensors begin..end-1, or the piece number `piece` of the split tensor number `begin`.
struct Item {
  int32_t begin, end;
  int64_t piece;  // -1: whole tensors
};

struct Split {
  explicit Split(int32_t tensor) : tensor(tensor) {}

  const int32_t tensor;
  int64_t pieces = 0;
  std::unique_ptr<double[]> squares;           // [pieces, 2]
  std::unique_ptr<std::atomic<bool>[]> taken;  // [pieces], for the update
  std::atomic<int64_t> left{0};
  std::atomic<bool> ready{false};
  LarsFactors factors;
};

// The pieces of one split tensor whose norms a thread computed.
struct Mine {
  int32_t split;
  std::vector<int64_t> pieces;
};

class Step {
 public:
  Step(const LarsArguments& arguments, std::vector<double> rates, double inverse_scale)
      : tensors_(arguments.tensors),
        groups_(arguments.groups),
        rates_(std::move(rates)),
        inverse_scale_(inverse_scale) {}

  void run() {
    int64_t total = 0;
    for (const LarsTensor& t : tensors_) total += t.n;
    const int64_t useful = (total + kGrain - 1) / kGrain;
    const int64_t threads =
        std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), useful));
    plan();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
  }

 private:
  const std::vector<LarsTensor>& tensors_;
  const std::vector<LarsGroup>& groups_;
  const std::vector<double> rates_;
  const double inverse_scale_;
  std::deque<Split> splits_;
  std::vector<Item> items_;
  std::atomic<int64_t> next_{0};

  static int64_t pieces(int64_t n) { return (n + kPiece - 1) / kPiece; }

  void plan() {
    const int32_t count = static_cast<int32_t>(tensors_.size());
    int32_t first = 0;
    int64_t tiny = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int64_t n = tensors_[i].n;
      if (n <= kOwned) {
        tiny += n;
        if (tiny < kGrain && i + 1 < count) continue;
        items_.push_back({first, i + 1, -1});
      } else {
        if (first < i) items_.push_back({first, i, -1});
        Split& split = splits_.emplace_back(i);
        const int32_t number = static_cast<int32_t>(splits_.size()) - 1;
        split.pieces = pieces(n);
        split.squares.reset(new double[2 * split.pieces]());
        split.taken.reset(new std::atomic<bool>[split.pieces]());
        split.left.store(split.pieces, std::memory_order_relaxed);
        for (int64_t k = 0; k < split.pieces; ++k) items_.push_back({number, number + 1, k});
      }
      first = i + 1;
      tiny = 0;
    }
  }

  // Ends for any number of threads: waiting is only for norms, and computing norms waits for
  // nothing.
  void work() {
    const int64_t items = static_cast<int64_t>(items_.size());
    std::vector<Mine> stack;
    for (;;) {
      if (update_newest(stack)) continue;
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= items) break;
      const Item& item = items_[i];
      if (item.piece < 0) {
        for (int32_t t = item.begin; t < item.end; ++t) whole(tensors_[t]);
        continue;
      }
      norms(splits_[item.begin], item.piece);
      if (stack.empty() || stack.back().split != item.begin) stack.push_back({item.begin, {}});
      stack.back().pieces.push_back(item.piece);
    }
    for (auto split = splits_.rbegin(); split != splits_.rend(); ++split) {
      while (!split->ready.load(std::memory_order_acquire)) std::this_thread::yield();
      for (int64_t k = split->pieces; k-- > 0;) update_piece(*split, k);
    }
  }

  // Updates one piece of the newest tensor on the stack whose trust ratio is known.
  bool update_newest(std::vector<Mine>& stack) {
    for (size_t s = stack.size(); s-- > 0;) {
      Mine& mine = stack[s];
      Split& split = splits_[mine.split];
      if (!split.ready.load(std::memory_order_acquire)) continue;
      update_piece(split, mine.pieces.back());
      mine.pieces.pop_back();
      if (mine.pieces.empty()) stack.erase(stack.begin() + static_cast<std::ptrdiff_t>(s));
      return true;
    }
    return false;
  }

  void norms(Split& split, int64_t piece) {
    const LarsTensor& t = tensors_[split.tensor];
    if (groups_[t.group].flags & lars_adapt) squares(t, piece, &split.squares[2 * piece]);
    if (split.left.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      split.factors = factors(t, split.squares.get());
      split.ready.store(true, std::memory_order_release);
    }
  }

  void update_piece(Split& split, int64_t piece) {
    if (split.taken[piece].exchange(true, std::memory_order_relaxed)) return;
    const LarsTensor& t = tensors_[split.tensor];
    const int64_t begin = piece * kPiece;
    update(t, begin, std::min(kPiece, t.n - begin), split.factors);
  }

  static size_t bytes(LarsType type) {
    return type == LarsType::f64 ? 8 : type == LarsType::f32 ? 4 : 2;
  }

  void squares(const LarsTensor& t, int64_t piece, double out[2]) const {
    const LarsGroup& group = groups_[t.group];
    const size_t offset = piece * kPiece * bytes(t.type);
    const double sign = (group.flags & lars_maximize) ? -1.0 : 1.0;
    SIMCLR_DISPATCH(lars_squares)
    (t.type, static_cast<const char*>(t.p) + offset, static_cast<const char*>(t.g) + offset,
     std::min(kPiece, t.n - piece * kPiece), group.flags & lars_joint_norm, sign * inverse_scale_,
     group.weight_decay, out);
  }

  LarsFactors factors(const LarsTensor& t, const double* squares) const {
    double p = 0.0, g = 0.0;
    for (int64_t k = 0; k < pieces(t.n); ++k) {
      p += squares[2 * k];
      g += squares[2 * k + 1];
    }
    return lars_factors(groups_[t.group], rates_[t.group], inverse_scale_, p, g);
  }

  void update(const LarsTensor& t, int64_t begin, int64_t n, const LarsFactors& f) const {
    const size_t offset = begin * bytes(t.type);
    SIMCLR_DISPATCH(lars_update)
    (t.type, static_cast<char*>(t.p) + offset, static_cast<const char*>(t.g) + offset,
     t.v ? static_cast<char*>(t.v) + offset : nullptr, n, f,
     groups_[t.group].flags & lars_nesterov);
  }

  void whole(const LarsTensor& t) const {
    double sums[2 * (kOwned / kPiece)] = {};
    if (groups_[t.group].flags & lars_adapt)
      for (int64_t k = 0; k < pieces(t.n); ++k) squares(t, k, sums + 2 * k);
    const LarsFactors f = factors(t, sums);
    // The last piece is still in the cache.
    for (int64_t k = pieces(t.n); k-- > 0;)
      update(t, k * kPiece, std::min(kPiece, t.n - k * kPiece), f);
  }
};

double value_of(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1,
                  "lars_: lr, grad_scale and found_inf must have one "
                  "element and be on the parameters' device");
  if (t.scalar_type() == torch::headeronly::ScalarType::Double)
    return *static_cast<const double*>(t.data_ptr());
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float,
                  "lars_: lr, grad_scale and found_inf must be float32 or float64");
  return *static_cast<const float*>(t.data_ptr());
}

void lars_cpu(const TensorList& params, const TensorList& grads, const TensorList& buffers,
              const std::vector<int64_t>& group_sizes, const std::vector<int64_t>& flags,
              const std::vector<double>& hyper, const std::vector<Tensor>& rates,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  if (found_inf && value_of(*found_inf) != 0.0) return;
  LarsArguments arguments(params, grads, buffers, group_sizes, flags, hyper);
  std::vector<double> values;
  for (size_t i = 0; i < flags.size(); ++i)
    values.push_back(rates.empty() ? arguments.groups[i].lr : value_of(rates.at(i)));
  Step(arguments, std::move(values), grad_scale ? 1.0 / value_of(*grad_scale) : 1.0).run();
  arguments.finish();
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_FRAGMENT(simclr_fast, m) {
  m.def(
      "lars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "int[] group_sizes, int[] flags, float[] hyper, Tensor[] lrs, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("lars_", &simclr::boxed_lars<simclr::lars_cpu>);
}
// With a sparse gradient the dispatcher comes here, where the arguments' check names the reason.
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, SparseCPU, m) {
  m.impl("lars_", &simclr::boxed_lars<simclr::lars_cpu>);
}
