// The CUDA step, called by the torch binding and, compiled for the host, by the emulation's tests.
#pragma once

#include "lars.h"

namespace simclr {

// Doubles of workspace that lars_cuda_step needs.
int64_t lars_cuda_workspace(const LarsTensor* tensors, int64_t count);

// Enqueues the step on the stream: two launches per dtype and list of tensors (see lars_cuda.cu).
// rates: a device pointer per group, or null to use the group's lr. grad_scale, found_inf: device
// pointers or null. Returns a cudaError_t.
int lars_cuda_step(const LarsTensor* tensors, int64_t count, const LarsGroup* groups,
                   int64_t group_count, const double* const* rates, const float* grad_scale,
                   const float* found_inf, double* workspace, void* stream);

}  // namespace simclr
