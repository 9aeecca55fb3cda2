// STABLE_TORCH_ERROR_CODE_CHECK, which throws if a function of torch's C interface failed.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// The oldest supported torch has it under this name only, with a shorter message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
