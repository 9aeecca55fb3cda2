// simclr_fast::lars_ on CUDA: from tensors to lars_cuda_step, on the current stream.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "lars_binding.h"
#include "lars_cuda.h"
#include "torch_check.h"

namespace simclr {
namespace {

// torch's function that gives its current stream, from the library that torch has loaded. To link
// libtorch_cuda.so would need a torch with CUDA wherever this file is built.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

CurrentStream current_stream_function() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* function = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(function,
                  "lars_: this torch has no libtorch_cuda.so with "
                  "aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<CurrentStream>(function);
}

const void* device_value(const Tensor& t, int32_t device, torch::headeronly::ScalarType type) {
  STD_TORCH_CHECK(
      t.is_cuda() && t.get_device_index() == device && t.numel() == 1 && t.scalar_type() == type,
      "lars_: lr (float64), grad_scale and found_inf (float32) must have one element "
      "and be on the parameters' device");
  return t.data_ptr();
}

void lars_cuda(const TensorList& params, const TensorList& grads, const TensorList& buffers,
               const std::vector<int64_t>& group_sizes, const std::vector<int64_t>& flags,
               const std::vector<double>& hyper, const std::vector<Tensor>& rates,
               const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  using torch::headeronly::ScalarType;
  if (params.empty()) return;
  const int32_t device = ask(aoti_torch_get_device_index, params[0]);
  const int32_t cuda = aoti_torch_device_type_cuda();
  for (const auto* list : {&params, &grads, &buffers})
    for (AtenTensorHandle t : *list)
      STD_TORCH_CHECK(ask(aoti_torch_get_device_type, t) == cuda &&
                          ask(aoti_torch_get_device_index, t) == device,
                      "lars_: one call takes the parameters, gradients and momentum buffers of one "
                      "device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  LarsArguments arguments(params, grads, buffers, group_sizes, flags, hyper);
  const int64_t count = static_cast<int64_t>(arguments.tensors.size());
  if (count == 0) return;
  std::vector<const double*> rate_pointers(flags.size(), nullptr);
  for (size_t i = 0; i < rates.size(); ++i)
    rate_pointers.at(i) =
        static_cast<const double*>(device_value(rates[i], device, ScalarType::Double));
  const auto flag = [&](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(device_value(*t, device, ScalarType::Float)) : nullptr;
  };
  const std::vector<int64_t> size = {lars_cuda_workspace(arguments.tensors.data(), count)};
  const Tensor workspace = torch::stable::new_empty(owned(params[0]), size, ScalarType::Double);
  static const CurrentStream current_stream = current_stream_function();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(device, &stream));
  const int error = lars_cuda_step(arguments.tensors.data(), count, arguments.groups.data(),
                                   static_cast<int64_t>(arguments.groups.size()),
                                   rate_pointers.data(), flag(grad_scale), flag(found_inf),
                                   static_cast<double*>(workspace.data_ptr()), stream);
  STD_TORCH_CHECK(error == 0, "lars_: CUDA launch failed with cudaError ", error);
  arguments.finish();
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CUDA, m) {
  m.impl("lars_", &simclr::boxed_lars<simclr::lars_cuda>);
}
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, SparseCUDA, m) {
  m.impl("lars_", &simclr::boxed_lars<simclr::lars_cuda>);
}
