// Runs the threads of a block as fibers, one block after the other.
#include <ucontext.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kMostThreads = 1024, kGuard = 256;

// Members arrive, and go on when all have: a block's barrier, or a warp's exchange.
struct Meeting {
  int expected = 0, arrived = 0;
  int64_t round = 0;
  const char* file = nullptr;
  int line = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, count;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  bool done = true;
  std::vector<std::vector<Copy>> copies;  // on their way, by group; the last is not yet committed
  const Meeting* waits = nullptr;         // for the round after `round`
  int64_t round = 0;
};

struct Operands {
  std::array<uint32_t, 4> a;
  std::array<uint32_t, 2> b;
};

struct Warp {
  Meeting meeting;
  double slot[2][32];  // two rounds: a fast lane may be one exchange ahead of a slow one
  Operands operands[2][32];
};

std::vector<Fiber> fibers(kMostThreads);
std::vector<Warp> warps(kMostThreads / 32);
Meeting block_meeting;
int current = 0;
const std::function<void()>* body = nullptr;
std::vector<unsigned char> shared;
size_t shared_size = 0;
std::string error;
int order_mode = 0;
std::mt19937 random_order;

// A switch of stacks. On x86-64 without the system call that swapcontext makes.
#if defined(__x86_64__)
extern "C" void flatmtl_switch(void** save, void* load);
asm(R"(
.text
.globl flatmtl_switch
.type flatmtl_switch, @function
flatmtl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void* stack_pointer[kMostThreads];
void* scheduler_pointer;
void to_fiber(int t) { flatmtl_switch(&scheduler_pointer, stack_pointer[t]); }
void to_scheduler() { flatmtl_switch(&stack_pointer[current], scheduler_pointer); }
#else
ucontext_t scheduler;
void to_fiber(int t) { swapcontext(&scheduler, &fibers[t].context); }
void to_scheduler() { swapcontext(&fibers[current].context, &scheduler); }
#endif

void run_fiber() {
  (*body)();
  fibers[current].done = true;
  to_scheduler();
}

void start(int t) {
  Fiber& fiber = fibers[t];
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  fiber.done = false;
  fiber.waits = nullptr;
  fiber.copies.assign(1, {});
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t{15};
  auto* slot = reinterpret_cast<void**>(top) - 2;
  slot[1] = nullptr;
  slot[0] = reinterpret_cast<void*>(&run_fiber);  // the switch's `ret` goes there
  stack_pointer[t] = slot - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
#endif
}

void meet(Meeting& meeting, const char* file, int line) {
  if (meeting.arrived == 0) {
    meeting.file = file;
    meeting.line = line;
  } else if (meeting.line != line || std::strcmp(meeting.file, file) != 0) {
    fail("threads of a block are at different barriers");
  }
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  fibers[current].waits = &meeting;
  fibers[current].round = meeting.round;
  to_scheduler();
}

void arrange(std::vector<int>& order) {
  if (order_mode == 1) std::sort(order.begin(), order.end(), std::greater<int>());
  if (order_mode == 2) std::shuffle(order.begin(), order.end(), random_order);
}

void run_block(int threads) {
  block_meeting = {threads, 0, 0, nullptr, 0};
  for (int w = 0; w * 32 < threads; ++w)
    warps[w].meeting = {std::min(32, threads - w * 32), 0, 0, nullptr, 0};
  std::fill(shared.begin(), shared.end(), 0xFF);
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) start(order[t] = t);
  int alive = threads;
  while (alive > 0 && error.empty()) {
    arrange(order);
    bool progress = false;
    for (const int t : order) {
      Fiber& fiber = fibers[t];
      if (fiber.done || (fiber.waits && fiber.waits->round == fiber.round)) continue;
      fiber.waits = nullptr;
      current = t;
      threadIdx = dim3(t, 0, 0);
      to_fiber(t);
      progress = true;
      if (fiber.done) --alive;
    }
    if (!progress) fail("a barrier that not all threads reach");
  }
  for (size_t i = 16 + shared_size; i < shared.size(); ++i)
    if (shared[i] != 0xFF) fail("a write beyond the dynamic shared memory");
}

}  // namespace

void fail(const char* what) {
  if (error.empty()) error = what;
}

void* dynamic_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(shared.data()) + 15) &
                                 ~uintptr_t{15});
}

void barrier(const char* file, int line) { meet(block_meeting, file, line); }

double exchange(double mine, int source, const char* file, int line) {
  const int t = static_cast<int>(threadIdx.x);
  Warp& warp = warps[t / 32];
  const int64_t round = warp.meeting.round;
  warp.slot[round % 2][t % 32] = mine;
  meet(warp.meeting, file, line);
  return warp.slot[round % 2][source];
}

namespace {

double half_of(uint32_t word, int k, bool half) {
  const auto bits = static_cast<uint16_t>(word >> (k * 16));
  return half ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

// A tensor core without a spare bit, as sm_70's: every addend is cut to a multiple of the largest
// one's last place in float32, towards zero, and so is the sum. (Later ones have one or two bits
// more, and some add 8 columns at a time.)
template <size_t N>
float cut_sum(const double (&addend)[N]) {
  double plain = 0, largest = 0;
  for (const double x : addend) {
    plain += x;
    largest = std::max(largest, std::fabs(x));
  }
  if (largest == 0 || !std::isfinite(plain) || !std::isfinite(largest))
    return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::max(std::ilogb(largest) - 23, -149));
  double sum = 0;
  for (const double x : addend) sum += std::trunc(x / unit) * unit;
  const auto nearest = static_cast<float>(sum);
  if (std::isinf(nearest)) return nearest;
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The operands of all lanes, once all are here.
const Operands* operands_of_warp(const Operands& mine, const char* file, int line) {
  const int t = static_cast<int>(threadIdx.x);
  Warp& warp = warps[t / 32];
  const int64_t round = warp.meeting.round;
  warp.operands[round % 2][t % 32] = mine;
  meet(warp.meeting, file, line);
  return warp.operands[round % 2];
}

double tf32_of(uint32_t word) {
  float value;
  word &= 0xFFFFE000u;
  std::memcpy(&value, &word, 4);
  return value;
}

}  // namespace

void mma(float (&c)[4], const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
         bool half, const char* file, int line) {
  const int t = static_cast<int>(threadIdx.x);
  const Operands* lanes = operands_of_warp({a, b}, file, line);
  for (int e = 0; e < 4; ++e) {
    // PTX: c0, c1 lie in row lane / 4, c2, c3 eight rows below; columns 2 (lane % 4) and one more.
    const int row = t % 32 / 4 + 8 * (e / 2), col = 2 * (t % 4) + e % 2;
    double addend[17] = {c[e]};
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, later = k / 8;
      const uint32_t left = lanes[row % 8 * 4 + owner].a[2 * later + row / 8];
      const uint32_t right = lanes[col * 4 + owner].b[later];
      addend[k + 1] = half_of(left, k % 2, half) * half_of(right, k % 2, half);
    }
    c[e] = cut_sum(addend);
  }
}

void mma_tf32(float (&c)[4], const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
              const char* file, int line) {
  const int t = static_cast<int>(threadIdx.x);
  const Operands* lanes = operands_of_warp({a, b}, file, line);
  for (int e = 0; e < 4; ++e) {
    // PTX: c as above; lane 4 g + t holds columns t and t + 4 of a's rows g, g + 8 and of b's row
    // g.
    const int row = t % 32 / 4 + 8 * (e / 2), col = 2 * (t % 4) + e % 2;
    double addend[9] = {c[e]};
    for (int k = 0; k < 8; ++k) {
      const int owner = k % 4, later = k / 4;
      addend[k + 1] = tf32_of(lanes[row % 8 * 4 + owner].a[2 * later + row / 8]) *
                      tf32_of(lanes[col * 4 + owner].b[later]);
    }
    c[e] = cut_sum(addend);
  }
}

void copy_async(void* to, const void* from, size_t bytes, size_t count) {
  check_aligned(to, bytes);
  check_aligned(from, bytes);
  std::memset(to, 0xFF, bytes);
  fibers[current].copies.back().push_back({to, from, bytes, count});
}

void commit_copies() { fibers[current].copies.emplace_back(); }

void wait_copies(int left) {
  auto& groups = fibers[current].copies;
  while (static_cast<int>(groups.size()) - 1 > left) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.count);
    }
    groups.erase(groups.begin());
  }
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  const int threads = static_cast<int>(block.x);
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || threads < 1 || threads > kMostThreads)
    fail("a launch whose grid or block is not allowed");
  if (shared_bytes > 96 * 1024) fail("a launch with more than 96 KiB of shared memory");
  if (!error.empty()) return cudaErrorLaunchFailure;
  gridDim = grid;
  blockDim = block;
  body = &kernel;
  shared_size = shared_bytes;
  shared.assign(shared_bytes + 16 + kGuard, 0xFF);
  std::vector<int> order(static_cast<size_t>(grid.x) * grid.y);
  for (size_t b = 0; b < order.size(); ++b) order[b] = static_cast<int>(b);
  arrange(order);
  for (const int b : order) {
    blockIdx = dim3(b % grid.x, b / grid.x, 0);
    run_block(threads);
    if (!error.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulated

extern "C" void emulated_order(int mode, unsigned seed) {
  emulated::order_mode = mode;
  emulated::random_order.seed(seed);
}

// The first error since the last call, or "".
extern "C" const char* emulated_error() {
  static std::string last;
  last = emulated::error;
  emulated::error.clear();
  return last.c_str();
}
