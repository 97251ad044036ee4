// Chooses the instruction set once, from what the processor says it runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace flatmtl::cpu {
namespace {

struct Choice {
  const Kernels* table;
  const char* name;
};

Choice choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("FLATMTL_CPU_ISA");
  const auto allowed = [&](const char* name) {
    // an upper bound: "avx2" rules out avx512, "base" rules out both
    if (!asked) return true;
    if (std::strcmp(asked, "base") == 0) return false;
    return std::strcmp(asked, "avx2") != 0 || std::strcmp(name, "avx2") == 0;
  };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return {avx512::table(), "avx512"};
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return {avx2::table(), "avx2"};
#endif
  return {base::table(), "base"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() { return *choice().table; }

}  // namespace flatmtl::cpu

// For `python -m flatmtl info`, by ctypes.
extern "C" __attribute__((visibility("default"))) const char* flatmtl_cpu_isa() {
  return flatmtl::cpu::choice().name;
}
