// simclr_fast::norm_act on the CPU. simclr_fast/ops/norm_act.py has its schema and meaning.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "norm_act.h"
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

// y may be x.
void compute(const Tensor& x, const Norm& own, const std::optional<Tensor>& other,
             const Norm& others, bool relu, void* y) {
  const bool last = is_channels_last(x);
  STD_TORCH_CHECK(last || x.is_contiguous(), "norm_act: x must be contiguous or channels_last");
  if (other) {
    bool same = other->scalar_type() == x.scalar_type() && other->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d)
      same = other->size(d) == x.size(d) && (x.size(d) == 1 || other->stride(d) == x.stride(d));
    STD_TORCH_CHECK(same, "norm_act: other must have the shape, dtype and layout of x");
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

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("norm_act", TORCH_BOX(&simclr::norm_act_cpu));
  m.impl("norm_act_", TORCH_BOX(&simclr::norm_act_in_place));
}
