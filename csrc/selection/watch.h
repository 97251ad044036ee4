// How a long computation asks whether it shall go on, and tells how far it is.
#pragma once

#include <chrono>

namespace flatmtl::selection {

class Watch {
 public:
  virtual ~Watch() = default;

  // Cheap enough for once in 0.1 ms. Throws to end the computation.
  void look(double fraction) {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return;
    last_ = now;
    pause(fraction);
  }

 protected:
  virtual void pause(double fraction) = 0;

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace flatmtl::selection
