// Included before all else where the build is for others' machines (IMCL_FAST_PORTABLE=1): asks for
// no glibc later than 2.28, the oldest that PyTorch's own wheels run on.
#pragma once

#include <features.h>

#if defined(__GLIBC__)
// glibc 2.29 gave these a version of their own, which leaves errno alone.
#if defined(__x86_64__)
#define IMCL_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define IMCL_FIRST_GLIBC "GLIBC_2.17"
#endif
#if defined(IMCL_FIRST_GLIBC)
__asm__(".symver exp, exp@" IMCL_FIRST_GLIBC);
__asm__(".symver log, log@" IMCL_FIRST_GLIBC);
#endif
#endif
