// simclr_fast::norm_act and norm_train on the CPU. simclr_fast/ops/norm_act.py and norm_train.py
// have their schemas and meaning.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "norm_act.h"
#include "norm_train.h"
#include "torch_check.h"

namespace simclr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// With few channels, the arrays of a batch norm repeat up to this many values.
constexpr int64_t kPeriod = 512;
// Values that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

NormActType type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return NormActType::f32;
    case ScalarType::Double:
      return NormActType::f64;
    case ScalarType::Half:
      return NormActType::f16;
    case ScalarType::BFloat16:
      return NormActType::bf16;
    default:
      STD_TORCH_CHECK(false, "norm_act: x must be float16, bfloat16, float32 or float64");
  }
}

// Of a dense tensor in channels_last. A size of 1 may have any stride.
bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) continue;
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.size(1) == 1 || x.stride(1) == 1;
}

Tensor output_like(const Tensor& x) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d)), strides.push_back(x.stride(d));
  const auto code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

struct Norm {
  std::optional<Tensor> mean, inverse, weight, bias;
};

// The statistics and parameters of a batch norm as the kernel takes them; of none without a mean.
template <typename T>
class Channels {
 public:
  Channels(const Norm& norm, int64_t channels, int64_t period) {
    if (!norm.mean) return;
    values_.resize(3 * period);
    const T* means = checked(norm.mean, channels);
    const T* inverses = checked(norm.inverse, channels);
    const T* weights = norm.weight ? checked(norm.weight, channels) : nullptr;
    const T* biases = norm.bias ? checked(norm.bias, channels) : nullptr;
    for (int64_t i = 0; i < period; ++i) {
      const int64_t c = i % channels;
      values_[i] = means[c];
      values_[period + i] = weights ? inverses[c] * weights[c] : inverses[c];
      values_[2 * period + i] = biases ? biases[c] : T(0);
    }
  }

  NormActChannels given() const {
    if (values_.empty()) return {nullptr, nullptr, nullptr};
    const T* first = values_.data();
    const int64_t period = int64_t(values_.size()) / 3;
    return {first, first + period, first + 2 * period};
  }

 private:
  static const T* checked(const std::optional<Tensor>& t, int64_t channels) {
    const ScalarType wanted = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK(t && t->scalar_type() == wanted && t->is_contiguous() && t->numel() == channels,
                    "norm_act: statistics and parameters must be contiguous, one per channel, in "
                    "float32, or float64 if x is");
    return static_cast<const T*>(t->const_data_ptr());
  }

  std::vector<T> values_;
};

template <typename T>
void run(NormAct& p, const Norm& own, const Norm& others) {
  const int64_t values = p.channels_last ? p.period : p.channels;
  const Channels<T> first(own, p.channels, values), second(others, p.channels, values);
  p.own = first.given();
  p.others = second.given();
  const int64_t units = (p.count + p.period - 1) / p.period;
  torch::stable::parallel_for(
      0, units, std::max<int64_t>(kGrain / p.period, 1),
      [&](int64_t begin, int64_t end) { SIMCLR_DISPATCH(norm_act)(p, begin, end); });
}

bool alike(const Tensor& a, const Tensor& b) {
  bool same = a.scalar_type() == b.scalar_type() && a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d)
    same = a.size(d) == b.size(d) && (a.size(d) == 1 || a.stride(d) == b.stride(d));
  return same;
}

// y may be x.
void compute(const Tensor& x, const Norm& own, const std::optional<Tensor>& other,
             const Norm& others, bool relu, void* y) {
  const bool last = is_channels_last(x);
  STD_TORCH_CHECK(last || x.is_contiguous(), "norm_act: x must be contiguous or channels_last");
  if (other) {
    STD_TORCH_CHECK(alike(*other, x), "norm_act: other must have the shape, dtype and layout of x");
  }
  STD_TORCH_CHECK((own.mean || others.mean) && (other || !others.mean),
                  "norm_act: x or other needs a mean");
  // The kernel normalises its first tensor.
  if (!own.mean) return compute(*other, others, x, own, relu, y);
  const int64_t channels = x.size(1), count = x.numel();
  if (!count) return;
  const int64_t repeats = std::max<int64_t>(kPeriod / channels, 1);
  NormAct p{};
  p.type = type_of(x);
  p.x = x.const_data_ptr();
  p.other = other ? other->const_data_ptr() : nullptr;
  p.y = y;
  p.relu = relu;
  p.channels_last = last;
  p.period = last ? channels * repeats : count / (x.size(0) * channels);
  p.channels = channels;
  p.count = count;
  if (p.type == NormActType::f64)
    run<double>(p, own, others);
  else
    run<float>(p, own, others);
}

Tensor norm_act_cpu(const Tensor& x, std::optional<Tensor> mean, std::optional<Tensor> inverse,
                    std::optional<Tensor> weight, std::optional<Tensor> bias,
                    std::optional<Tensor> other, std::optional<Tensor> other_mean,
                    std::optional<Tensor> other_inverse, std::optional<Tensor> other_weight,
                    std::optional<Tensor> other_bias, bool relu) {
  STD_TORCH_CHECK(x.dim() >= 2, "norm_act: x must be [N, C, ...]");
  Tensor y = output_like(x);
  compute(x, {mean, inverse, weight, bias}, other,
          {other_mean, other_inverse, other_weight, other_bias}, relu, y.mutable_data_ptr());
  return y;
}

Tensor norm_act_in_place(Tensor x, std::optional<Tensor> mean, std::optional<Tensor> inverse,
                         std::optional<Tensor> weight, std::optional<Tensor> bias,
                         std::optional<Tensor> other, std::optional<Tensor> other_mean,
                         std::optional<Tensor> other_inverse, std::optional<Tensor> other_weight,
                         std::optional<Tensor> other_bias, bool relu) {
  STD_TORCH_CHECK(x.dim() >= 2, "norm_act_: x must be [N, C, ...]");
  compute(x, {mean, inverse, weight, bias}, other,
          {other_mean, other_inverse, other_weight, other_bias}, relu, x.mutable_data_ptr());
  return x;
}

// Values whose sums are one part. The parts are added in order, so the sums do not depend on the
// number of threads.
constexpr int64_t kPart = 1 << 15;

// float32 [channels].
Tensor floats(int64_t channels) {
  const int64_t stride = 1;
  const auto code =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(ScalarType::Float));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &channels, &stride, code,
                                                         aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

const float* per_channel(const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == channels,
      "norm_train: statistics and parameters must be contiguous, one per channel, in "
      "float32");
  return static_cast<const float*>(t.const_data_ptr());
}

// A pass over the rows of x: `channels` values that repeat in memory.
struct Rows {
  int64_t channels, rows;
  NormTrain p{};

  explicit Rows(const Tensor& x) : channels(x.size(1)), rows(x.numel() / x.size(1)) {
    p.type = type_of(x);
    STD_TORCH_CHECK(
        p.type != NormActType::f64 && x.dim() >= 2 && is_channels_last(x) && x.numel() > 0,
        "norm_train: x must be float16, bfloat16 or float32, [N, C] or channels_last, "
        "and not empty");
    const int64_t repeats = kNormBlock / std::gcd(channels, kNormBlock);
    p.x = x.const_data_ptr();
    p.period = channels * repeats;
    p.units = rows / repeats;
    p.rest = rows % repeats * channels;
  }

  std::vector<float> repeated(const float* values) const {
    std::vector<float> made(p.period);
    for (int64_t i = 0; i < p.period; ++i) made[i] = values[i % channels];
    return made;
  }

  int64_t part() const { return std::max<int64_t>(kPart / p.period, 1); }

  // With the unit of what is left.
  int64_t all_units() const { return p.units + (p.rest > 0); }

  // kernel(begin, end, sums) over all units; returns s and q, [2, channels].
  template <typename Kernel>
  std::vector<double> sums(const Kernel& kernel) const {
    const int64_t parts = (all_units() + part() - 1) / part();
    std::vector<double> each(parts * 2 * p.period), total(2 * channels);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        kernel(k * part(), std::min((k + 1) * part(), all_units()), &each[k * 2 * p.period]);
    });
    for (int64_t k = 0; k < parts; ++k)
      for (int64_t i = 0; i < 2; ++i)
        for (int64_t j = 0; j < p.period; ++j)
          total[i * channels + j % channels] += each[(2 * k + i) * p.period + j];
    return total;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_train(const Tensor& x, std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias,
                                                      std::optional<Tensor> other, double eps,
                                                      bool relu) {
  Rows pass(x);
  const int64_t channels = pass.channels;
  const bool half = pass.p.type != NormActType::f32;
  // Values near the mean, so that squares are small: those of the first row.
  std::vector<float> first(channels);
  for (int64_t c = 0; c < channels; ++c) {
    if (!half) {
      first[c] = static_cast<const float*>(pass.p.x)[c];
    } else if (pass.p.type == NormActType::bf16) {
      first[c] = float(static_cast<const torch::headeronly::BFloat16*>(pass.p.x)[c]);
    } else {
      first[c] = float(static_cast<const torch::headeronly::Half*>(pass.p.x)[c]);
    }
  }
  const auto moments = [&] {
    const std::vector<float> shift = pass.repeated(first.data());
    pass.p.shift = shift.data();
    return pass.sums([&](int64_t begin, int64_t end, double* out) {
      SIMCLR_DISPATCH(norm_sums)(pass.p, begin, end, out);
    });
  };
  std::vector<double> sums = moments();
  // If the first row is far outside, squares were large: once more with the mean.
  bool far = false;
  std::vector<float> means(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = sums[c] / pass.rows;
    const double squares = sums[channels + c] / pass.rows - offset * offset;
    far = far || offset * offset > 16.0 * squares;
    means[c] = float(first[c] + offset);
  }
  if (far) {
    first = means;
    sums = moments();
  }
  Tensor mean = floats(channels), variance = floats(channels), inverse = floats(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double offset = sums[c] / pass.rows;
    const double squares = std::max(sums[channels + c] / pass.rows - offset * offset, 0.0);
    static_cast<float*>(mean.mutable_data_ptr())[c] = float(first[c] + offset);
    static_cast<float*>(variance.mutable_data_ptr())[c] = float(squares);
    static_cast<float*>(inverse.mutable_data_ptr())[c] = float(1.0 / std::sqrt(squares + eps));
  }
  Tensor y = output_like(x);
  compute(x, {mean, inverse, weight, bias}, other, {}, relu, y.mutable_data_ptr());
  return {y, mean, variance, inverse};
}

// y: with ReLU. keep: also return g, else an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_train_backward(
    const Tensor& dy, const Tensor& x, std::optional<Tensor> y, const Tensor& mean,
    const Tensor& inverse, std::optional<Tensor> weight, bool keep) {
  Rows pass(x);
  const int64_t channels = pass.channels;
  STD_TORCH_CHECK(alike(dy, x) && (!y || alike(*y, x)),
                  "norm_train_backward: dy and y must have the shape, dtype and layout of x");
  const float* means = per_channel(mean, channels);
  const float* inverses = per_channel(inverse, channels);
  const float* weights = weight ? per_channel(*weight, channels) : nullptr;
  const std::vector<float> shift = pass.repeated(means);
  Tensor dx = output_like(x), g = keep ? output_like(x) : floats(0);
  Tensor dweight = floats(channels), dbias = floats(channels);
  pass.p.shift = shift.data();
  pass.p.dy = dy.const_data_ptr();
  pass.p.y = y ? y->const_data_ptr() : nullptr;
  pass.p.g = keep ? g.mutable_data_ptr() : nullptr;
  pass.p.dx = dx.mutable_data_ptr();
  const std::vector<double> sums = pass.sums([&](int64_t begin, int64_t end, double* out) {
    SIMCLR_DISPATCH(norm_gradient_sums)(pass.p, begin, end, out);
  });
  std::vector<float> a(channels), b(channels), d(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double s = sums[c], q = sums[channels + c], i = inverses[c];
    const double scale = weights ? weights[c] * i : i;
    static_cast<float*>(dweight.mutable_data_ptr())[c] = float(q * i);
    static_cast<float*>(dbias.mutable_data_ptr())[c] = float(s);
    a[c] = float(scale);
    b[c] = float(-scale * i * i * q / pass.rows);
    d[c] = float(-scale * s / pass.rows);
  }
  const std::vector<float> as = pass.repeated(a.data()), bs = pass.repeated(b.data());
  const std::vector<float> ds = pass.repeated(d.data());
  pass.p.a = as.data(), pass.p.b = bs.data(), pass.p.d = ds.data();
  if (keep) {
    pass.p.dy = pass.p.g;
    pass.p.y = nullptr;
  }
  torch::stable::parallel_for(0, pass.all_units(), pass.part(), [&](int64_t begin, int64_t end) {
    SIMCLR_DISPATCH(norm_gradient)(pass.p, begin, end);
  });
  return {dx, g, dweight, dbias};
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&simclr::norm_act_cpu));
  m.impl("norm_act_", TORCH_BOX(&simclr::norm_act_in_place));
  m.impl("norm_train", TORCH_BOX(&simclr::norm_train));
  m.impl("norm_train_backward", TORCH_BOX(&simclr::norm_train_backward));
}
