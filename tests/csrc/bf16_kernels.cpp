// Runs NT-Xent's kernels of bfloat16 inputs without torch and, compiled for an instruction set
// without them, without AVX512_BF16 and AMX: portable code stands for the instructions. Prints "ok"
// and returns 0, or prints what differs from the formulas in double precision.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "driver.h"

namespace simclr::SIMCLR_ISA {
void nt_xent_normalize_bf16(const NtXentNormalize<float, Bf16>& p);
void nt_xent_forward_bf16(const NtXentForward<float>& p);
void nt_xent_backward_bf16(const NtXentBackward<float, Bf16>& p);
}  // namespace simclr::SIMCLR_ISA

using namespace simclr;
using namespace simclr::SIMCLR_ISA;

namespace {

std::mt19937 generator(7);

double value(Bf16 half) {
  const uint32_t bits = uint32_t(half.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return double(result);
}

struct Case {
  int64_t pairs, dim;
  double temperature, length;
  bool decoupled;
  int64_t threads;
  bool keep;
};

struct Results {
  std::vector<float> loss, stats;
  std::vector<double> grad;  // rows interleaved
};

// z: [2, pairs, dim]
Results computed(const Case& c, const std::vector<Bf16>& z, const std::vector<float>& grad) {
  const int64_t rows = 2 * c.pairs, d = c.dim;
  const Workers workers{c.threads, run_threads};
  std::vector<float> u(rows * d), inv_norm(rows), kept(kept_size(rows, d));
  std::vector<double> lse(rows);
  std::vector<Bf16> grad_z(rows * d);
  Results out{std::vector<float>(rows), std::vector<float>(4 * rows), {}};
  const Bf16 *z1 = z.data(), *z2 = z.data() + c.pairs * d;
  nt_xent_normalize_bf16({z1, z2, d, rows, d, c.temperature, u.data(), inv_norm.data(), workers});
  float* keep = c.keep && !kept.empty() ? kept.data() : nullptr;
  Memory memory;
  nt_xent_forward_bf16({u.data(),
                        rows,
                        d,
                        0,
                        rows,
                        c.temperature,
                        c.decoupled,
                        out.loss.data(),
                        lse.data(),
                        out.stats.data(),
                        workers,
                        memory.workspace(),
                        {},
                        keep,
                        z1,
                        z2,
                        inv_norm.data()});
  float grad_temperature;
  nt_xent_backward_bf16({grad.data(),
                         1,
                         1.0,
                         u.data(),
                         rows,
                         d,
                         lse.data(),
                         0,
                         rows,
                         c.decoupled,
                         out.loss.data(),
                         z1,
                         z2,
                         c.temperature,
                         grad_z.data(),
                         &grad_temperature,
                         workers,
                         memory.workspace(),
                         {},
                         keep,
                         inv_norm.data()});
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < d; ++k)
      out.grad.push_back(value(grad_z[(i % 2 * c.pairs + i / 2) * d + k]));
  return out;
}

Results formula(const Case& c, const std::vector<Bf16>& z, const std::vector<float>& grad) {
  const int64_t rows = 2 * c.pairs, d = c.dim;
  std::vector<double> u(rows * d), length(rows), p(rows * rows);
  Results out{std::vector<float>(rows), {}, std::vector<double>(rows * d)};
  for (int64_t i = 0; i < rows; ++i) {
    const Bf16* row = z.data() + (i % 2 * c.pairs + i / 2) * d;
    for (int64_t k = 0; k < d; ++k) length[i] += value(row[k]) * value(row[k]);
    length[i] = std::sqrt(length[i]);
    for (int64_t k = 0; k < d; ++k) u[i * d + k] = value(row[k]) / length[i];
  }
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0, positive = 0;
    for (int64_t j = 0; j < rows; ++j) {
      if (i == j) continue;
      double s = 0;
      for (int64_t k = 0; k < d; ++k) s += u[i * d + k] * u[j * d + k];
      s = (s - 1) / c.temperature;
      if (i / 2 == j / 2) positive = s;
      if (i / 2 != j / 2 || !c.decoupled) sum += p[i * rows + j] = std::exp(s);
    }
    out.loss[i] = float(std::log(sum) - positive);
    for (int64_t j = 0; j < rows; ++j)
      p[i * rows + j] = grad[i] * (p[i * rows + j] / sum - (i != j && i / 2 == j / 2));
  }
  for (int64_t i = 0; i < rows; ++i) {
    double* g = out.grad.data() + i * d;
    double along = 0;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t k = 0; k < d; ++k)
        g[k] += (p[i * rows + j] + p[j * rows + i]) * u[j * d + k] / c.temperature;
    for (int64_t k = 0; k < d; ++k) along += g[k] * u[i * d + k];
    for (int64_t k = 0; k < d; ++k) g[k] = (g[k] - along * u[i * d + k]) / length[i];
  }
  return out;
}

void fail(const char* what, const Case& c, double error) {
  std::printf("%s: error %g; %d pairs, %d features, temperature %g, length %g\n", what, error,
              int(c.pairs), int(c.dim), c.temperature, c.length);
  std::exit(1);
}

void check(Case c) {
  const int64_t rows = 2 * c.pairs;
  std::normal_distribution<float> normal;
  std::vector<Bf16> z(rows * c.dim);
  for (Bf16& element : z) {
    const float sample = normal(generator) * float(c.length);
    uint32_t bits;
    std::memcpy(&bits, &sample, 4);
    element.bits = uint16_t(bits >> 16);
  }
  std::vector<float> grad;
  for (int64_t i = 0; i < rows; ++i) grad.push_back(0.5f + float(i % 3));
  c.threads = 1, c.keep = false;
  const Results expected = formula(c, z, grad), actual = computed(c, z, grad);
  c.threads = 3, c.keep = true;
  const Results other = computed(c, z, grad);
  if (actual.loss != other.loss || actual.stats != other.stats || actual.grad != other.grad)
    fail("threads, or what the forward kept", c, 0);
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const double error = std::fabs(double(actual.loss[i]) - double(expected.loss[i]));
    if (!(error < 4e-7 / c.temperature * (1 + std::fabs(expected.loss[i])))) fail("loss", c, error);
  }
  for (size_t i = 0; i < actual.grad.size(); ++i) {
    difference += std::pow(actual.grad[i] - expected.grad[i], 2);
    norm += std::pow(expected.grad[i], 2);
  }
  // Half a unit in the last place of bfloat16 is 0.002 to 0.004 of a value.
  const double error = std::sqrt(difference / norm);
  if (!(error < 4e-3)) fail("gradient", c, error);
}

}  // namespace

int main() {
  for (const int64_t pairs : {2, 7, 171})
    for (const int64_t dim : {3, 33, 130})
      for (const double temperature : {0.1, 0.005})
        for (const double length : {1.0, 1e-10, 1e30})
          check({pairs, dim, temperature, length, length == 1e30, 1, false});
  std::puts("ok");
}
