// How the extension was built, and what it chose at run time, as text. The pybind11 module tells
// it where one is, and the operators' library to any Python, by ctypes.
#pragma once

#include <string>
#include <vector>

namespace imcl {

// By its name: compiler, isa_compiled, isa_levels, isa_chosen, hardware_threads,
// cuda_architectures, cuda_ptx or nvcc; the ISA levels with commas between them. Throws
// std::runtime_error where IMCL_FAST_ISA names no level of this CPU, or nothing has that name.
std::string fact(const std::string& name);

// The names of the ISA levels compiled in, or of those that this CPU can run, best first.
std::vector<std::string> isa_names(bool only_supported);

}  // namespace imcl

// The same for ctypes: the text, or "!" and an error's. It stays until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* imcl_fast_fact(const char* name);
