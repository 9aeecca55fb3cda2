// Runs the CPU kernels of csrc/*_kernel.cpp without torch, under sanitizers, for the instruction
// set SIMCLR_ISA. Every array ends where its contents end. Usage: cpu_kernels [largest number of
// pairs]. Prints "ok" and returns 0, or prints what differs from the formulas in double precision.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/augment.h"
#include "../../csrc/lars.h"
#include "driver.h"

#define SIMCLR_KERNEL(name) ::simclr::SIMCLR_ISA::name

using namespace simclr;

namespace {

std::mt19937 generator(7);

void fail(const char* what, double error) {
  std::printf("%s: error %g\n", what, error);
  std::exit(1);
}

// `offset` elements beyond an aligned address.
template <class T>
struct Array {
  std::unique_ptr<char[]> memory;
  T* data;
  int64_t n;
  explicit Array(int64_t count, int64_t offset = 0)
      : memory(new char[(count + offset) * sizeof(T)]),
        data(reinterpret_cast<T*>(memory.get()) + offset),
        n(count) {}
  void normal() {
    std::normal_distribution<double> distribution;
    for (int64_t i = 0; i < n; ++i) data[i] = T(distribution(generator));
  }
  bool operator==(const Array& other) const {
    return n == other.n && !std::memcmp(data, other.data, n * sizeof(T));
  }
};

void run(const NtXentNormalize<float>& p) { SIMCLR_KERNEL(nt_xent_normalize_f32)(p); }
void run(const NtXentNormalize<double>& p) { SIMCLR_KERNEL(nt_xent_normalize_f64)(p); }
void run(const NtXentForward<float>& p) { SIMCLR_KERNEL(nt_xent_forward_f32)(p); }
void run(const NtXentForward<double>& p) { SIMCLR_KERNEL(nt_xent_forward_f64)(p); }
void run(const NtXentBackward<float>& p) { SIMCLR_KERNEL(nt_xent_backward_f32)(p); }
void run(const NtXentBackward<double>& p) { SIMCLR_KERNEL(nt_xent_backward_f64)(p); }

struct Case {
  int64_t pairs, dim;
  double temperature;
  bool decoupled, classes;
};

// The loss of every row in double precision, rows interleaved.
template <class T>
std::vector<double> formula(const Case& c, const Array<T>& z, const std::vector<int32_t>& ids) {
  const int64_t rows = 2 * c.pairs, d = c.dim;
  std::vector<double> unit(rows * d), loss(rows);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = z.data + (c.classes ? i : i % 2 * c.pairs + i / 2) * d;
    double squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += double(row[k]) * double(row[k]);
    for (int64_t k = 0; k < d; ++k) unit[i * d + k] = double(row[k]) / std::sqrt(squares);
  }
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0, positive = 0, positives = 0;
    for (int64_t j = 0; j < rows; ++j) {
      double s = 0;
      for (int64_t k = 0; k < d; ++k) s += unit[i * d + k] * unit[j * d + k];
      s /= c.temperature;
      const bool same = c.classes ? ids[i] == ids[j] : i / 2 == j / 2;
      if (i == j) continue;
      if (same) positive += s, positives += 1;
      if (!same || !c.decoupled) sum += std::exp(s - 1 / c.temperature);
    }
    loss[i] = positives ? std::log(sum) + 1 / c.temperature - positive / positives : 0;
  }
  return loss;
}

template <class T>
struct Results {
  Array<T> loss, stats, grad_z, recomputed;
};

template <class T>
Results<T> nt_xent(const Case& c, const Array<T>& z, const std::vector<int32_t>& ids,
                   int64_t threads) {
  const int64_t rows = 2 * c.pairs, d = c.dim;
  const Workers workers{threads, run_threads};
  Array<T> u(rows * d), inv_norm(rows), grad(rows), inverse_count(rows), kept(kept_size(rows, d));
  Array<int32_t> own_ids(rows);
  Array<double> lse(rows), lse_of_made(rows);
  Array<T> made(rows * d), made_norm(rows), loss_of_made(rows), stats_of_made(4 * rows);
  T grad_temperature;
  for (int64_t i = 0; i < rows; ++i) {
    own_ids.data[i] = ids[i];
    int64_t others = -1;
    for (int64_t j = 0; j < rows; ++j) others += ids[i] == ids[j];
    inverse_count.data[i] = others ? T(1.0 / double(others)) : T(0);
    grad.data[i] = T(0.5 + double(i % 3));
  }
  const Classes<T> classes =
      c.classes ? Classes<T>{own_ids.data, inverse_count.data} : Classes<T>{};
  const int64_t pairs = c.pairs;
  const T *z1 = z.data, *z2 = z.data + (c.classes ? d : pairs * d);
  run(NtXentNormalize<T>{z1, z2, c.classes ? 2 * d : d, rows, d, c.temperature, u.data,
                         inv_norm.data, workers});
  Results<T> out{Array<T>(rows), Array<T>(4 * rows), Array<T>(rows * d), Array<T>(rows * d)};
  std::memset(out.stats.data, 0, 4 * rows * sizeof(T));
  const bool keep = kept.n && !c.classes;
  {
    Memory memory;
    run(NtXentForward<T>{u.data, rows, d, 0, rows, c.temperature, c.decoupled, out.loss.data,
                         lse.data, c.classes ? nullptr : out.stats.data, workers,
                         memory.workspace(), classes, keep ? kept.data : nullptr});
  }
  if (!c.classes) {
    Memory memory;
    const NtXentNormalize<T> normalize{
        z1, z2, d, rows, d, c.temperature, made.data, made_norm.data, workers};
    NtXentForward<T> p{made.data,
                       rows,
                       d,
                       0,
                       rows,
                       c.temperature,
                       c.decoupled,
                       loss_of_made.data,
                       lse_of_made.data,
                       stats_of_made.data,
                       workers,
                       memory.workspace()};
    p.normalize = &normalize;
    run(p);
    if (!(made == u && made_norm == inv_norm && lse_of_made == lse))
      fail("u made by the forward", double(pairs));
  }
  const auto backward = [&](T* grad_z, const T* from) {
    Memory memory;
    run(NtXentBackward<T>{grad.data,
                          1,
                          1.0,
                          u.data,
                          rows,
                          d,
                          lse.data,
                          0,
                          rows,
                          c.decoupled,
                          out.loss.data,
                          z1,
                          z2,
                          c.temperature,
                          grad_z,
                          &grad_temperature,
                          workers,
                          memory.workspace(),
                          classes,
                          from});
  };
  backward(out.recomputed.data, nullptr);
  backward(out.grad_z.data, keep ? kept.data : nullptr);
  if (c.classes || pairs < 3) return out;

  // The middle pairs alone, as one of several ranks has them.
  const int64_t first = 2, local = rows - 4, count = local / 2;
  Array<T> loss(local), z_local(local * d), grad_z(local * d);
  Array<double> lse_local(local);
  for (int v = 0; v < 2; ++v)
    std::memcpy(z_local.data + v * count * d, z.data + (v * pairs + 1) * d, count * d * sizeof(T));
  Memory memory;
  run(NtXentForward<T>{u.data, rows, d, first, local, c.temperature, c.decoupled, loss.data,
                       lse_local.data, nullptr, workers, memory.workspace()});
  run(NtXentBackward<T>{grad.data, 1, 1.0, u.data, rows, d, lse.data, first, local, c.decoupled,
                        loss.data, z_local.data, z_local.data + count * d, c.temperature,
                        grad_z.data, &grad_temperature, workers, memory.workspace()});
  for (int64_t i = 0; i < local; ++i) {
    const double error = std::fabs(double(loss.data[i]) - double(out.loss.data[first + i]));
    if (!(error < 1e-4)) fail("a rank's own rows", error);
  }
  return out;
}

template <class T>
void check_nt_xent(int64_t largest, double tolerance) {
  for (const int64_t pairs : {int64_t(2), int64_t(7), largest})
    for (const int64_t dim : {int64_t(3), int64_t(33), int64_t(130)})
      for (const double temperature : {0.1, 0.005})
        for (int kind = 0; kind < 3; ++kind) {
          const Case c{pairs, dim, temperature, kind == 1, kind == 2};
          Array<T> z(2 * pairs * dim);
          z.normal();
          std::vector<int32_t> ids;
          for (int64_t i = 0; i < 2 * pairs; ++i) ids.push_back(int32_t(i % (pairs / 2 + 1)));
          const Results<T> one = nt_xent(c, z, ids, 1), three = nt_xent(c, z, ids, 3);
          if (!(one.loss == three.loss && one.stats == three.stats && one.grad_z == three.grad_z))
            fail("three threads differ from one", double(pairs));
          if (!(one.grad_z == one.recomputed)) fail("what the forward kept", double(pairs));
          const std::vector<double> expected = formula(c, z, ids);
          for (int64_t i = 0; i < 2 * pairs; ++i) {
            const double error = std::fabs(double(one.loss.data[i]) - expected[i]);
            if (!(error < tolerance / temperature)) fail("loss", error);
          }
        }
}

template <class T>
void check_lars(LarsType type, double tolerance) {
  for (const int64_t n : {1, 7, 16, 17, 63, 64, 65, 1000, 4099})
    for (const int64_t offset : {0, 1, 3})
      for (const bool nesterov : {false, true})
        for (const bool with_momentum : {false, true}) {
          Array<T> p(n, offset), g(n, offset), v(n, offset);
          for (Array<T>* array : {&p, &g, &v}) array->normal();
          const std::vector<double> p0(p.data, p.data + n), v0(v.data, v.data + n);
          double sums[2], expected[2] = {};
          SIMCLR_KERNEL(lars_squares)(type, p.data, g.data, n, nesterov, 0.5, 0.1, sums);
          for (int64_t i = 0; i < n; ++i) {
            const double d = nesterov ? 0.5 * double(g.data[i]) + 0.1 * p0[i] : double(g.data[i]);
            expected[0] += p0[i] * p0[i];
            expected[1] += d * d;
          }
          for (int k = 0; k < 2; ++k)
            if (!(std::fabs(sums[k] - expected[k]) < tolerance * (1 + expected[k])))
              fail("lars_squares", sums[k] - expected[k]);
          const LarsFactors f{0.5, 0.1, 0.3, 0.9, 0.2};
          T* buffer = with_momentum ? v.data : nullptr;
          SIMCLR_KERNEL(lars_update)(type, p.data, g.data, buffer, n, f, nesterov);
          for (int64_t i = 0; i < n; ++i) {
            const double d = 0.3 * (0.5 * double(g.data[i]) + 0.1 * p0[i]);
            const double next = 0.9 * v0[i] + d;
            const double u = !with_momentum ? d : nesterov ? 0.9 * next + d : next;
            const double error = double(p.data[i]) - (p0[i] - 0.2 * u);
            if (!(std::fabs(error) < tolerance)) fail("lars_update", error);
          }
        }
}

// Other tests check the numbers. This checks tails and addresses.
void run_lars_halves(LarsType type) {
  for (const int64_t n : {1, 17, 1000, 4099}) {
    Array<uint16_t> p(n, 1), g(n, 1), v(n, 1);
    for (Array<uint16_t>* array : {&p, &g, &v})
      for (int64_t i = 0; i < n; ++i) array->data[i] = uint16_t(0x3c00 + i % 512);
    double sums[2];
    SIMCLR_KERNEL(lars_squares)(type, p.data, g.data, n, true, 0.5, 0.1, sums);
    SIMCLR_KERNEL(lars_update)(type, p.data, g.data, v.data, n, {0.5, 0.1, 0.3, 0.9, 0.2}, true);
    if (!(sums[0] > 0 && std::isfinite(sums[0]))) fail("lars_squares of halves", sums[0]);
  }
}

template <class T>
void check_augment(Pixel pixel, double largest) {
  for (const int64_t size : {1, 5, 32})
    for (const int64_t height : {1, 3, 40})
      for (int kind = 0; kind < 8; ++kind) {
        const bool simclr = kind & 1, channels_last = kind & 2, strong = kind & 4;
        const int64_t width = height + 2, row_stride = 3 * (width + 1);
        // The box ends with the image's last pixel.
        Array<T> image((height - 1) * row_stride + 3 * width);
        for (int64_t i = 0; i < image.n; ++i) image.data[i] = T(largest * double(i % 97) / 96);
        AugmentSpec spec{};
        spec.size = size;
        spec.antialias = spec.clip_resized = spec.luma_contrast = spec.reflect = !simclr;
        spec.bilinear = !simclr;
        spec.channels_last = channels_last;
        spec.blur_radius = int32_t(size > 8 ? 3 : size > 1 ? 1 : 0);
        spec.pixel = pixel;
        for (int c = 0; c < 3; ++c) spec.scale[c] = 1;
        Array<float> out(3 * size * size);
        AugmentView view{};
        view.pixels = image.data;
        view.row_stride = row_stride;
        view.height = height;
        view.width = width;
        view.flip = strong;
        view.sigma = strong && spec.blur_radius ? 1.3f : 0;
        view.out = out.data;
        const ColorStep steps[5] = {{Step::hue, 0.1f, {}},
                                    {Step::affine, 1.4f, {}},
                                    {simclr ? Step::chroma : Step::blend, 0.3f, {}},
                                    {Step::affine, 0.7f, {}},
                                    {Step::gray, 0, {}}};
        view.steps = strong ? 5 : 0;
        view.contrast = strong ? 1 : 0;
        std::memcpy(view.step, steps, sizeof(steps));
        const int64_t floats = SIMCLR_KERNEL(augment_scratch)(spec, height, width);
        void* scratch = nullptr;
        if (posix_memalign(&scratch, 64, size_t(floats) * sizeof(float))) std::abort();
        SIMCLR_KERNEL(augment_view)(spec, view, static_cast<float*>(scratch));
        std::free(scratch);
        for (int64_t i = 0; i < out.n; ++i)
          if (!(out.data[i] >= -0.2f && out.data[i] <= 1.2f)) fail("a view's pixel", out.data[i]);
      }
}

}  // namespace

int main(int count, char** values) {
  const int64_t largest = count > 1 ? std::atoll(values[1]) : 130;
  check_nt_xent<float>(largest, 2e-6);
  check_nt_xent<double>(largest, 1e-13);
  check_lars<float>(LarsType::f32, 1e-5);
  check_lars<double>(LarsType::f64, 1e-12);
  run_lars_halves(LarsType::f16);
  run_lars_halves(LarsType::bf16);
  check_augment<uint8_t>(Pixel::uint8, 255);
  check_augment<float>(Pixel::float32, 1);
  std::puts("ok");
}
