// imcl_fast._build_info: how the extension was built, and what it chose at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "facts.h"

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the compiled extension was built, and what it chose at run time.";
  m.def("compiler", [] { return imcl::fact("compiler"); }, "Version of the C++ compiler.");
  m.def(
      "isa_compiled", [] { return imcl::isa_names(false); }, "ISA levels compiled in, best first.");
  m.def("isa_levels", [] { return imcl::isa_names(true); }, "Those of them this CPU can run.");
  m.def(
      "isa_chosen", [] { return imcl::fact("isa_chosen"); },
      "The level in use: the best, or the one IMCL_FAST_ISA names.");
  m.def(
      "hardware_threads", [] { return std::stoi(imcl::fact("hardware_threads")); },
      "Hardware threads of this machine.");
  m.def(
      "cuda_architectures", [] { return imcl::fact("cuda_architectures"); },
      "CUDA architectures compiled in, separated by semicolons (80;90a); empty if none.");
  m.def(
      "cuda_ptx", [] { return imcl::fact("cuda_ptx"); },
      "Those of them that are there as PTX too, which later GPUs run as well.");
  m.def("nvcc", [] { return imcl::fact("nvcc"); }, "Version of nvcc; empty if none.");
}
