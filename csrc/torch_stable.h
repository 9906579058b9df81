// PyTorch's stable ABI, all of it by this header: of a call that failed, be it one of the headers'
// own, it throws what PyTorch says, "CUDA out of memory" for one, which scripts that look for a
// batch size wait for. The headers' macro would tell only which call it was.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// Weak: torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace imcl {

[[noreturn]] inline void throw_torchs(const char* call) {
  const char* what = torch_exception_get_what_without_backtrace
                         ? torch_exception_get_what_without_backtrace()
                         : nullptr;
  throw std::runtime_error(what && *what ? what : std::string(call) + " failed");
}

}  // namespace imcl

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    ::imcl::throw_torchs(#call);     \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
