// What is said of a launch that failed because library, driver and device do not fit together. Text
// from facts alone: no CUDA and no torch, so that tests/launch_error.cpp reads it without a GPU.
#pragma once

#include <string>

namespace flatmtl {

struct Mismatch {
  int code = 0;            // the cudaError_t
  const char* name = "";   // as CUDA calls it
  int toolkit = 0;         // that built the library, as in 13000
  const char* archs = "";  // for which it has code, as in "8.0;9.0+PTX"
  int device = 0;
  int capability = 0;  // of the device, as in 90; 0: it does not say
  int driver = 0;      // the CUDA version that it supports, as in 12040; 0: none found
};

// 12040 as "12.4".
inline std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// 90 as "9.0".
inline std::string capability_name(int number) {
  return std::to_string(number / 10) + "." + std::to_string(number % 10);
}

// Empty where the error has another cause.
inline std::string mismatch_text(const Mismatch& found) {
  // The values of cudaErrorInsufficientDriver, cudaErrorInvalidDeviceFunction,
  // cudaErrorNoKernelImageForDevice and cudaErrorUnsupportedPtxVersion, which never change.
  constexpr int kOldDriver = 35, kNoFunction = 98, kNoImage = 209, kNewPtx = 222;
  const std::string toolkit = cuda_version(found.toolkit);
  const std::string wanted = capability_name(found.capability);
  const std::string rebuild = "build flatmtl with TORCH_CUDA_ARCH_LIST=" +
                              (found.capability ? wanted : "the device's capability");
  std::string advice;
  switch (found.code) {
    case kOldDriver:
      advice = "update the driver";
      if (found.driver >= 12000 && found.driver / 1000 < found.toolkit / 1000) {
        // no toolkit that builds flatmtl is older; what torch is for is not known here
        const std::string major = std::to_string(found.driver / 1000);
        advice += ", or install a flatmtl for CUDA " + major + " beside a torch for CUDA " + major;
      }
      break;
    case kNewPtx:
      advice = "update the driver to one for CUDA " + toolkit + ", or " + rebuild;
      break;
    case kNoFunction:
    case kNoImage:
      advice = found.capability && found.capability < 80 ? "flatmtl's kernels need 8.0 or later"
                                                         : rebuild;
      break;
    default:
      return "";
  }
  const std::string device = found.capability ? "the device has capability " + wanted
                                              : "the device's capability is unknown";
  const std::string driver = found.driver ? "the driver supports CUDA " + cuda_version(found.driver)
                                          : "no driver was found";
  return "flatmtl's CUDA library cannot run on device " + std::to_string(found.device) + " (" +
         found.name + "): it was built by CUDA " + toolkit + " for the architectures " +
         found.archs + "; " + device + " and " + driver + ": " + advice +
         "; with FLATMTL_CUDA=0 in the environment flatmtl runs on its reference operators"
         " (`python -m flatmtl info` says more)";
}

}  // namespace flatmtl
