// What the row kernels use of CUDA, on a host: to run their code where there is no GPU. Included in front of it.
//
// A thread is a fiber. It runs to the next point at which it waits for others of its warp or block. Which warp and which
// thread goes on then is drawn, the same in every run, and half of the time a warp goes on alone until it has to wait:
// that a barrier is missing mostly shows. Blocks run one after the other. Memory that is __shared__ and has its size from
// the launch is poisoned before each of them; what has it from its declaration keeps what the block before has left.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <vector>

#define __device__
#define __global__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };

namespace host {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "kernel on the host: %s\n", what);
  std::abort();
}

struct Place { unsigned x; };

constexpr int MOST_THREADS = 1024, STACK = 1 << 16;
constexpr int MOST_SHARED = 48 << 10, GUARD = 4096;  // bytes that a launch may ask for, and of what lies behind them

// Of a warp, or of a block: who has come to a common point.
struct Meeting { int arrived = 0; unsigned generation = 0; };

struct Fiber { ucontext_t context; bool ended; };

struct State {
  Fiber fibers[MOST_THREADS];
  std::vector<char> stacks = std::vector<char>(static_cast<size_t>(MOST_THREADS) * STACK);
  ucontext_t scheduler;
  Meeting warps[MOST_THREADS / 32], block;
  int alive_of_warp[MOST_THREADS / 32], alive = 0;
  int64_t values[MOST_THREADS / 32][2][32];
  std::vector<char> shared;
  uint64_t random = 1;
  unsigned moved = 0;  // arrivals and ends
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline State& state() {
  static State one;
  return one;
}

}  // namespace host

static host::Place threadIdx, blockIdx, blockDim, gridDim;

namespace host {

inline void give_way() {
  const unsigned mine = threadIdx.x;
  swapcontext(&state().fibers[mine].context, &state().scheduler);
  threadIdx.x = mine;
}

inline void meet(Meeting& meeting, int all) {
  const unsigned generation = meeting.generation;
  ++state().moved;
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == generation) give_way();
}

// The values of all lanes of this thread's warp.
inline const int64_t* exchange(int64_t value) {
  State& s = state();
  const int warp = threadIdx.x / 32;
  if (s.alive_of_warp[warp] != 32) fail("a lane has ended that others of its warp wait for");
  Meeting& meeting = s.warps[warp];
  int64_t* values = s.values[warp][meeting.generation % 2];  // who is ahead writes into the other half
  values[threadIdx.x % 32] = value;
  meet(meeting, 32);
  return values;
}

inline void enter() {
  State& s = state();
  s.body(s.arguments);
  s.fibers[threadIdx.x].ended = true;
  ++s.moved;
  --s.alive;
  --s.alive_of_warp[threadIdx.x / 32];
  if (s.alive && s.block.arrived == s.alive) {  // those that wait for the block wait for this one no longer
    s.block.arrived = 0;
    ++s.block.generation;
  }
}

inline void run_block(int threads) {
  State& s = state();
  s.alive = threads;
  for (int w = 0; w < threads / 32; ++w) { s.warps[w] = Meeting(); s.alive_of_warp[w] = 32; }
  s.block = Meeting();
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = s.fibers[i];
    fiber.ended = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = s.stacks.data() + static_cast<size_t>(i) * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &s.scheduler;
    makecontext(&fiber.context, enter, 0);
    order[i] = i;
  }
  auto draw = [&](int n) {
    s.random = s.random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<int>((s.random >> 33) % n);
  };
  const int warps = threads / 32;
  while (s.alive) {
    const unsigned before = s.moved;
    const int ahead = draw(2) ? draw(warps) : -1;  // a warp that goes on alone until it has to wait for others
    for (int w = 0; w < warps; ++w) {
      if (ahead >= 0 && w != ahead) continue;
      unsigned last;
      do {
        last = s.moved;
        for (int i = 31; i > 0; --i) std::swap(order[32 * w + i], order[32 * w + draw(i + 1)]);
        for (int k = 0; k < 32; ++k) {
          const int i = order[32 * w + k];
          if (s.fibers[i].ended) continue;
          threadIdx.x = i;
          swapcontext(&s.scheduler, &s.fibers[i].context);
        }
      } while (ahead >= 0 && s.moved != last);
    }
    if (ahead < 0 && s.moved == before) fail("threads wait for each other for ever");
  }
}

// A parameter out of the words in which `cuda_launch` lays them out.
template <class P> P taken(const int64_t*& words) {
  P value;
  std::memcpy(&value, words, sizeof(P));
  words += sizeof(P) > 8 ? sizeof(P) / 8 : 1;
  return value;
}

template <class... P>
void launch(void (*kernel)(P...), const int64_t* words, int n_words, int blocks, int threads, int shared) {
  if (n_words != (... + (sizeof(P) > 8 ? sizeof(P) / 8 : 1))) fail("another number of parameters");
  if (threads % 32 || threads > MOST_THREADS) fail("no whole warps, or too many");
  std::pair<void (*)(P...), std::tuple<P...>> call{kernel, std::tuple<P...>{taken<P>(words)...}};
  State& s = state();
  if (shared > MOST_SHARED) fail("more shared memory than CUDA gives");
  s.arguments = &call;
  s.body = [](void* given) {
    auto& one = *static_cast<decltype(call)*>(given);
    std::apply(one.first, one.second);
  };
  gridDim.x = blocks;
  blockDim.x = threads;
  for (int i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    s.shared.assign(shared + GUARD, static_cast<char>(0xff));
    run_block(threads);
    for (int j = shared; j < shared + GUARD; ++j)
      if (s.shared[j] != static_cast<char>(0xff)) fail("a store behind shared memory");
  }
}

inline float* dynamic_shared() { return reinterpret_cast<float*>(state().shared.data()); }

}  // namespace host

// ---------------------------------------------------------------- what kernels call

inline void __syncthreads() { host::meet(host::state().block, host::state().alive); }
inline void __syncwarp() { host::exchange(0); }

template <class T> T __shfl_xor_sync(unsigned, T value, int step) {
  int64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  std::memcpy(&value, host::exchange(word) + (threadIdx.x % 32 ^ step), sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const int64_t* votes = host::exchange(vote);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(votes[lane]) << lane;
  return all;
}

inline int __reduce_add_sync(unsigned, int value) {
  const int64_t* values = host::exchange(value);
  int64_t all = 0;
  for (int lane = 0; lane < 32; ++lane) all += values[lane];
  return static_cast<int>(all);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class A, class B> B bits_as(A x) {
  B y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(unsigned x) { return bits_as<unsigned, float>(x); }
inline float __int_as_float(int x) { return bits_as<int, float>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<float, unsigned>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class T> void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) host::fail("a store to an address that is not aligned");
  *to = value;
}

template <class T> T min(T a, T b) { return b < a ? b : a; }
