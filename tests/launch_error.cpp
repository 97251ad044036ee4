// The text of csrc/common/launch_error.h behind a C function, for tests/test_launch_error.py.
#include "launch_error.h"

extern "C" const char* mismatch_text(int code, const char* name, int toolkit, const char* archs,
                                     int device, int capability, int driver) {
  static std::string text;
  flatmtl::Mismatch found;
  found.code = code;
  found.name = name;
  found.toolkit = toolkit;
  found.archs = archs;
  found.device = device;
  found.capability = capability;
  found.driver = driver;
  text = flatmtl::mismatch_text(found);
  return text.c_str();
}
