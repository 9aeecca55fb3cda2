// Positives by class on the CPU: the forward pass sums the rows of each class, the backward pass
// changes the weights W of positives.
#pragma once

#include "nt_xent_schedule.h"

namespace simclr::SIMCLR_ISA {
namespace {

// Sums over the rows of each class, in double precision.
template <class T>
struct ClassSums {
  const int64_t* slot;  // [total], the class of a row
  const double* sums;   // [classes, dim]
  int64_t dim;

  const double* of(int64_t row) const { return sums + slot[row] * dim; }
};

template <class T>
ClassSums<T> sum_classes(const NtXentForward<T>& p) {
  const int32_t* ids = p.classes.ids;
  int64_t* slot = allocate<int64_t>(p.workspace, p.total);
  int64_t* of_id = allocate<int64_t>(p.workspace, p.total);
  for (int64_t i = 0; i < p.total; ++i) of_id[i] = -1;
  int64_t classes = 0;
  for (int64_t i = 0; i < p.total; ++i) {
    if (of_id[ids[i]] < 0) of_id[ids[i]] = classes++;
    slot[i] = of_id[ids[i]];
  }
  double* sums = allocate<double>(p.workspace, classes * p.dim);
  // A thread adds whole features, so the order of a sum does not depend on the number of threads.
  constexpr int64_t chunk = 2 * kDoubles;
  parallel(p.workers, round_up(p.dim, chunk) / chunk, [&](int64_t c) {
    const int64_t end = smaller(p.dim, (c + 1) * chunk);
    for (int64_t k = c * chunk; k < end; k += kDoubles) {
      for (int64_t s = 0; s < classes; ++s) store_doubles(sums + s * p.dim + k, end - k, Doubles{});
      for (int64_t i = 0; i < p.total; ++i) {
        double* sum = sums + slot[i] * p.dim + k;
        store_doubles(sum, end - k,
                      load_doubles(sum, end - k) + load_doubles(p.u + i * p.dim + k, end - k));
      }
    }
  });
  return {slot, sums, p.dim};
}

// log2 of the softmax's denominator → the row's loss and lse.
template <class T>
void finish_class_row(const NtXentForward<T>& p, const ClassSums<T>& sums, double log2_sum,
                      int64_t row) {
  const int64_t i = p.row_offset + row;
  const T* u = p.u + i * p.dim;
  const double* total = sums.of(i);
  const double inverse = double(p.classes.inverse_count[i]);
  Doubles positive{};
  for (int64_t k = 0; k < p.dim; k += kDoubles) {
    const Doubles own = load_doubles(u + k, p.dim - k);
    positive += own * (load_doubles(total + k, p.dim - k) - own);
  }
  const double loss = log2_sum - sum_lanes(positive) * inverse;
  p.loss[row] = inverse > 0 ? T(loss / kLog2E) : T(0);
  p.lse[row] = log2_sum / kLog2E;
}

// Subtracts share_i + share_j from the weights W of positives. For aligned views the difference is
// small; it keeps its digits because it is taken before the product of W and u. w: the panel of
// block J that starts at row j.
template <class T>
void subtract_shares(const Block<T>& I, const Block<T>& J, int64_t j, const int32_t* ids,
                     const T* share, T* w, int64_t stride) {
  const int64_t first = J.first + j, columns = smaller(kPanel<T>, J.count - j);
  for (int64_t i = 0; i < I.count; ++i) {
    const int64_t row = I.first + i, self = row - first;
    T* weights = w + i * stride + j;
    for (int64_t c = 0; c < columns; ++c)
      weights[c] -= ids[first + c] == ids[row] ? share[row] + share[first + c] : T(0);
    if (0 <= self && self < columns) weights[self] = 0;
  }
}

// From g = Σ_j W_ij u_j to dL/dz and <u, dL/du> of one row. dL/du is scale·g.
template <class T>
void finish_class_row_gradient(const NtXentBackward<T>& p, double scale, const T* g,
                               int64_t padded_dim, double* radial, int64_t row) {
  const int64_t dim = p.dim;
  const T *z = p.z1 + row * dim, *grad = g + row * padded_dim;
  const double length = norm(z, dim);
  const bool clamped = !(length > kNormEps);
  const double inverse = 1 / (clamped ? kNormEps : length);
  Doubles along{};
  for (int64_t k = 0; k < dim; k += kDoubles)
    along += load_doubles(grad + k, dim - k) * load_doubles(z + k, dim - k);
  radial[row] = sum_lanes(along) * scale * inverse;
  const double projected = clamped ? 0 : radial[row] * inverse;
  for (int64_t k = 0; k < dim; k += kDoubles)
    store_doubles(
        p.grad_z + row * dim + k, dim - k,
        (scale * load_doubles(grad + k, dim - k) - projected * load_doubles(z + k, dim - k)) *
            inverse);
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA
