// Runs csrc/lars_cuda.cu on the host and compares each element with the formulas in double
// precision. Usage: lars_emulation [elements of the largest tensor]. Prints "ok" and returns 0, or
// prints what differs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/lars_cuda.cu"

using namespace simclr;

namespace {

std::mt19937 generator(7);

template <typename T>
double get(const T& x) {
  return static_cast<double>(widen(x));
}
template <typename T>
void put(double x, T* out) {
  if constexpr (std::is_same_v<T, double>)
    *out = x;
  else
    narrow(static_cast<float>(x), out);
}

// Exactly as large as its contents, so that ASan sees the first element beyond.
template <typename T>
struct Array {
  std::unique_ptr<char[]> memory;
  T* data;
  int64_t n;
  Array(int64_t count, int64_t offset, double scale)
      : memory(new char[(count + offset) * sizeof(T)]),
        data(reinterpret_cast<T*>(memory.get()) + offset),
        n(count) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) put(scale * normal(generator), data + i);
  }
  std::vector<double> values() const {
    std::vector<double> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(get(data[i]));
    return out;
  }
};

struct Run {
  double worst = 0.0;

  template <typename T>
  void check(const char* name, const T* got, const std::vector<double>& expected, double floor) {
    const double unit = std::is_same_v<T, double>   ? 1e-12
                        : std::is_same_v<T, float>  ? 3e-7
                        : std::is_same_v<T, __half> ? 6e-4
                                                    : 5e-3;
    for (size_t i = 0; i < expected.size(); ++i) {
      const double error = std::fabs(get(got[i]) - expected[i]);
      if (!(error <= unit * (std::fabs(expected[i]) + floor)) &&
          !(std::isnan(expected[i]) && std::isnan(get(got[i])))) {
        std::printf("%s[%zu]: got %.9g, expected %.9g\n", name, i, get(got[i]), expected[i]);
        std::exit(1);
      }
    }
  }

  // Two steps over tensors of the given sizes; sizes alternate between the groups.
  template <typename T>
  void step(LarsType type, const std::vector<int64_t>& sizes, std::vector<LarsGroup> groups,
            int64_t offset, double scale, bool tensor_rate, float grad_scale, float found_inf) {
    std::vector<Array<T>> p, g, v;
    std::vector<LarsTensor> tensors;
    for (size_t i = 0; i < sizes.size(); ++i) {
      p.emplace_back(sizes[i], offset, scale);
      g.emplace_back(sizes[i], offset, 0.1 * scale);
      v.emplace_back(sizes[i], offset, 0.01 * scale);
      const int32_t group = static_cast<int32_t>(i * groups.size() / sizes.size());
      const bool momentum = groups[group].momentum != 0.0;
      tensors.push_back(
          {p[i].data, g[i].data, momentum ? v[i].data : nullptr, sizes[i], type, group});
    }
    std::vector<double> rate_values(groups.size(), 0.07);
    std::vector<const double*> rates;
    for (const double& rate : rate_values) rates.push_back(tensor_rate ? &rate : nullptr);
    const int64_t count = static_cast<int64_t>(tensors.size());
    const int64_t workspace = lars_cuda_workspace(tensors.data(), count);
    for (int t = 0; t < 2; ++t) {
      std::vector<std::vector<double>> old_p, old_v;
      for (size_t i = 0; i < sizes.size(); ++i) {
        old_p.push_back(p[i].values());
        old_v.push_back(v[i].values());
      }
      std::unique_ptr<double[]> squares(new double[workspace]);
      for (int64_t i = 0; i < workspace; ++i) squares[i] = NAN;
      lars_cuda_step(tensors.data(), count, groups.data(), static_cast<int64_t>(groups.size()),
                     rates.data(), grad_scale == 1.0f ? nullptr : &grad_scale, &found_inf,
                     squares.get(), nullptr);
      for (size_t i = 0; i < sizes.size(); ++i) {
        const LarsGroup& group = groups[tensors[i].group];
        const double s = ((group.flags & lars_maximize) ? -1.0 : 1.0) / grad_scale;
        double p_squares = 0.0, g_squares = 0.0;
        for (int64_t k = 0; k < sizes[i]; ++k) {
          const double x = old_p[i][k],
                       d = s * get(g[i].data[k]) +
                           ((group.flags & lars_joint_norm) && group.weight_decay != 0.0
                                ? group.weight_decay * x
                                : 0.0);
          p_squares += x * x;
          g_squares += d * d;
        }
        const double rate = tensor_rate ? rate_values[tensors[i].group] : group.lr;
        const LarsFactors f = lars_factors(group, rate, 1.0, p_squares, g_squares);
        std::vector<double> new_p = old_p[i], new_v = old_v[i];
        for (int64_t k = 0; k < sizes[i] && found_inf == 0.0f; ++k) {
          const double decayed = f.decay == 0.0 ? 0.0 : f.decay * old_p[i][k];
          const double d = f.into * (s * get(g[i].data[k]) + decayed);
          double u = d;
          if (f.momentum != 0.0) {
            new_v[k] = f.momentum * old_v[i][k] + d;
            u = (group.flags & lars_nesterov) ? f.momentum * new_v[k] + d : new_v[k];
          }
          new_p[k] = old_p[i][k] - f.out * u;
        }
        check("p", p[i].data, new_p, 4 * scale);
        check("v", v[i].data, new_v, 0.04 * scale);
      }
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t large = argc > 1 ? std::atoll(argv[1]) : 3 * kChunk + 5;
  const LarsGroup plain = {0.1, 0.9, 0.0, 1e-2, 1e-3, 1e-8, lars_adapt};
  const auto with = [&](int32_t flags) {
    LarsGroup group = plain;
    group.flags |= flags;
    return group;
  };
  LarsGroup still = plain, damped = plain, sgd = plain;
  still.momentum = 0.0;
  damped.dampening = 0.25;
  sgd.flags = 0;
  std::vector<int64_t> sizes = {large, 1, kChunk, 7, kChunk + 1};
  Run run;
  run.step<float>(LarsType::f32, sizes, {plain, sgd}, 0, 1.0, false, 1.0f, 0.0f);
  run.step<float>(LarsType::f32, sizes, {still, damped}, 1, 1.0, true, 1.0f, 0.0f);
  run.step<float>(LarsType::f32, sizes, {plain}, 0, 1.0, false, 1.0f, 1.0f);
  if (large > kChunk) {
    run.step<double>(LarsType::f64, {large}, {with(lars_nesterov)}, 0, 1.0, false, 1.0f, 0.0f);
    run.step<__half>(LarsType::f16, {large, 19}, {with(lars_joint_norm)}, 0, 1.0, true, 1024.0f,
                     0.0f);
    run.step<__nv_bfloat16>(LarsType::bf16, {large, 19}, {with(lars_tf_order | lars_joint_norm)}, 3,
                            1.0, false, 1.0f, 0.0f);
    run.step<float>(LarsType::f32, {large}, {with(lars_maximize | lars_clip)}, 0, 1.0, false, 8.0f,
                    0.0f);
    // Squares beyond float32's range, and tensors of zeros.
    run.step<float>(LarsType::f32, {large}, {with(lars_decay_when_zero)}, 0, 1e25, false, 1.0f,
                    0.0f);
    run.step<float>(LarsType::f32, {large}, {with(lars_decay_when_zero)}, 0, 1e-25, false, 1.0f,
                    0.0f);
    run.step<float>(LarsType::f32, {5}, {plain}, 0, 0.0, false, 1.0f, 0.0f);
    for (int64_t tail = 1; tail < 18; ++tail)
      run.step<float>(LarsType::f32, {tail}, {plain}, 0, 1.0, false, 1.0f, 0.0f);
    // More tensors and more groups than fit one list.
    run.step<float>(LarsType::f32, std::vector<int64_t>(kMaxTensors + 3, 2), {plain, sgd}, 0, 1.0,
                    false, 1.0f, 0.0f);
    run.step<float>(LarsType::f32, std::vector<int64_t>(kMaxGroups + 3, 2),
                    std::vector<LarsGroup>(kMaxGroups + 3, plain), 0, 1.0, false, 1.0f, 0.0f);
  }
  std::printf("ok\n");
  return 0;
}
