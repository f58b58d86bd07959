"""The CUDA C++ of the row kernels: what all of them use, norms, heads, activation and choice of a token.

Launched by `moempi.device.cuda_rows`, which says what goes in and out.
"""

TOKENS = 4  # whose heads a block turns
KEPT = 4  # packs of a row that a thread keeps between the two passes of a norm

SOURCE = r"""
typedef long long integer;

// bfloat16 by its bits, so that no header of the toolkit is needed.
struct bf16 { unsigned short bits; };

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline bf16 narrow<bf16>(float x) {
  unsigned u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};  // to nearest, ties to even
}

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

// Packs are moved in words of up to 16 bytes: compilers split a plain store of one into a store of every value.
template <int BYTES> struct Word;
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<16> { typedef uint4 type; };

template <class T, int N> struct Moved {
  static constexpr int SIZE = sizeof(Pack<T, N>), BYTES = SIZE < 16 ? SIZE : 16, COUNT = SIZE / BYTES;
  typedef typename Word<BYTES>::type word;
};

template <class T, int N> __device__ inline Pack<T, N> load(const T* from) {
  typename Moved<T, N>::word words[Moved<T, N>::COUNT];
  for (int i = 0; i < Moved<T, N>::COUNT; ++i)
    words[i] = reinterpret_cast<const typename Moved<T, N>::word*>(from)[i];
  Pack<T, N> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}
template <class T, int N> __device__ inline void store(T* to, const Pack<T, N>& pack) {
  typename Moved<T, N>::word words[Moved<T, N>::COUNT];
  memcpy(words, &pack, sizeof(pack));
  for (int i = 0; i < Moved<T, N>::COUNT; ++i) __stwb(reinterpret_cast<typename Moved<T, N>::word*>(to) + i, words[i]);
}

__device__ inline float warp_sum(float x) {
  for (int step = 16; step; step /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sum over a block of whole warps, in an order that depends on the number of threads alone; the same on all threads.
__device__ inline float block_sum(float x) {
  __shared__ float parts[32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.0f);
  __syncthreads();
  return x;
}

// A row [D] by its root mean square, N values of it by a thread at a time: the order of the sum follows from D and N.
// `take` gives the values that begin at a place, once for each; from `again` those come that a thread cannot keep.
template <class T, int N, class Take, class Put>
__device__ inline void norm_row(Take take, const T* again, const float* weight, Put put, integer d, float eps) {
  const integer step = N * blockDim.x, first = N * threadIdx.x;
  Pack<T, N> kept[N_KEPT];
  float squares = 0.0f;
  auto add = [&](const Pack<T, N>& x) {
    for (int j = 0; j < N; ++j) squares = squares + wide(x.at[j]) * wide(x.at[j]);
  };
#pragma unroll
  for (int c = 0; c < N_KEPT; ++c)
    if (first + c * step < d) add(kept[c] = take(first + c * step));
  for (integer i = first + N_KEPT * step; i < d; i += step) add(take(i));
  const float factor = rsqrtf(block_sum(squares) / d + eps);
  auto scale = [&](integer i, const Pack<T, N>& x) {
    const Pack<float, N> w = load<float, N>(weight + i);
    Pack<float, N> y;
    for (int j = 0; j < N; ++j) y.at[j] = wide(x.at[j]) * factor * w.at[j];
    put(i, y);
  };
#pragma unroll
  for (int c = 0; c < N_KEPT; ++c)
    if (first + c * step < d) scale(first + c * step, kept[c]);
  for (integer i = first + N_KEPT * step; i < d; i += step) scale(i, load<T, N>(again + i));
}

template <class T, int N> __device__ inline Pack<T, N> narrow_all(const Pack<float, N>& x) {
  Pack<T, N> y;
  for (int j = 0; j < N; ++j) y.at[j] = narrow<T>(x.at[j]);
  return y;
}

template <class T, int N>
__global__ void rms_norm(const T* x, const float* weight, T* out, integer d, float eps) {
  const T* row = x + blockIdx.x * d;
  T* to = out + blockIdx.x * d;
  norm_row<T, N>([=](integer i) { return load<T, N>(row + i); }, row, weight,
                 [=](integer i, const Pack<float, N>& y) { store<T, N>(to + i, narrow_all<T, N>(y)); }, d, eps);
}

// Residual and the rows that are added to it, [T, D]; then the RMS norm of their sum, as `rms_norm` has it.
template <class T, int N>
__global__ void add_norm(const T* residual, const T* rows, const float* weight, T* sum, T* normed, integer d,
                         float eps) {
  const integer begin = blockIdx.x * d;
  auto add = [=](integer i) {
    const Pack<T, N> a = load<T, N>(residual + begin + i), b = load<T, N>(rows + begin + i);
    Pack<T, N> y;
    for (int j = 0; j < N; ++j) y.at[j] = narrow<T>(wide(a.at[j]) + wide(b.at[j]));
    store<T, N>(sum + begin + i, y);
    return y;
  };
  T* to = normed + begin;
  norm_row<T, N>(add, sum + begin, weight,
                 [=](integer i, const Pack<float, N>& y) { store<T, N>(to + i, narrow_all<T, N>(y)); }, d, eps);
}

// A head by its root mean square and turned by its position; so many lanes have it, all of a warp come here. `put` gets
// N values of its lower half and those that they are turned with.
template <class T, int N, class Put>
__device__ inline void turn_head(const T* head, const float* weight, const float* cosines, const float* sines, Put put,
                                 int half, int lane, int lanes, float eps) {
  float squares = 0.0f;
  for (int low = N * lane; low < half; low += N * lanes) {
    const Pack<T, N> x = load<T, N>(head + low), y = load<T, N>(head + low + half);
    for (int j = 0; j < N; ++j) squares = squares + (wide(x.at[j]) * wide(x.at[j]) + wide(y.at[j]) * wide(y.at[j]));
  }
  for (int step = lanes / 2; step; step /= 2) squares = squares + __shfl_xor_sync(0xffffffffu, squares, step);
  const float factor = rsqrtf(squares / (2 * half) + eps);
  for (int low = N * lane; low < half; low += N * lanes) {
    const Pack<T, N> a = load<T, N>(head + low), b = load<T, N>(head + low + half);
    const Pack<float, N> w_low = load<float, N>(weight + low), w_high = load<float, N>(weight + low + half);
    const Pack<float, N> c_low = load<float, N>(cosines + low), c_high = load<float, N>(cosines + low + half);
    const Pack<float, N> s_low = load<float, N>(sines + low), s_high = load<float, N>(sines + low + half);
    Pack<float, N> to_low, to_high;
    for (int j = 0; j < N; ++j) {
      const float x = wide(a.at[j]) * factor * w_low.at[j], y = wide(b.at[j]) * factor * w_high.at[j];
      to_low.at[j] = x * c_low.at[j] + y * s_low.at[j];
      to_high.at[j] = y * c_high.at[j] + x * s_high.at[j];
    }
    put(low, to_low, to_high);
  }
}

// A block has N_TOKENS tokens, a warp each, and of their queries, keys or values as many heads as a warp holds with so
// many lanes for each. Queries and keys are normed and turned, queries scaled. Keys lie position beside position in the
// cache: they are written so, out of what the block has of them.
template <class T, int N>
__global__ void __launch_bounds__(32 * N_TOKENS, 32 / N_TOKENS)
turn_heads(const T* rows, const float* norm, const float* cosines, const float* sines, const integer* positions,
           const integer* pages, const integer* offsets, T* queries, T* keys, T* values, integer tokens, integer heads,
           integer kv_heads, integer dim, integer width, integer page_size, integer lanes, float eps, float scale) {
  extern __shared__ float turned[];  // [heads, dim, N_TOKENS + 1], of keys
  // In 32 bits: a division in 64 takes long.
  const int q_heads = static_cast<int>(heads), kv = static_cast<int>(kv_heads), d = static_cast<int>(dim), half = d / 2;
  const int each = static_cast<int>(lanes), together = 32 / each;
  const int of_queries = (q_heads + together - 1) / together, of_keys = (kv + together - 1) / together;
  const int parts = of_queries + 2 * of_keys, first = static_cast<int>(blockIdx.x) / parts * N_TOKENS;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const int kind = part < of_queries ? 0 : part < of_queries + of_keys ? 1 : 2;  // queries, keys, values
  const int first_head = (part - (kind > 0) * of_queries - (kind > 1) * of_keys) * together;
  const int mine = threadIdx.x % 32 / each, head = first_head + mine, lane = threadIdx.x % each;
  const int among_all = (kind > 0) * q_heads + (kind > 1) * kv + head;
  const int n = min(static_cast<int>(tokens) - first, N_TOKENS), warp = threadIdx.x / 32;
  const bool there = warp < n && head < (kind ? kv : q_heads);
  const integer t = first + warp;
  const T* row = rows + (t * (q_heads + 2 * kv) + among_all) * d;
  if (kind == 2) {
    T* to = there ? values + ((pages[t] * kv + head) * page_size + offsets[t]) * width : nullptr;
    for (int i = N * lane; there && i < d; i += N * each) store<T, N>(to + i, load<T, N>(row + i));
    return;
  }
  auto put = [&](int low, Pack<float, N>& x, Pack<float, N>& y) {
    if (kind == 0) {
      for (int j = 0; j < N; ++j) { x.at[j] = x.at[j] * scale; y.at[j] = y.at[j] * scale; }
      T* to = queries + (t * q_heads + head) * d + low;
      store<T, N>(to, narrow_all<T, N>(x));
      store<T, N>(to + half, narrow_all<T, N>(y));
      return;
    }
    for (int j = 0; j < N; ++j) {
      turned[(mine * d + low + j) * (N_TOKENS + 1) + warp] = x.at[j];
      turned[(mine * d + low + half + j) * (N_TOKENS + 1) + warp] = y.at[j];
    }
  };
  const integer angle = there ? positions[t] * d : 0;
  turn_head<T, N>(row, norm + among_all * d, cosines + angle, sines + angle, put, there ? half : 0, lane, each, eps);
  if (kind == 0) return;
  __syncthreads();
  const int here = min(together, kv - first_head) * d, j = threadIdx.x % N_TOKENS;
  if (j >= n) return;
  T* to = keys + (pages[first + j] * kv + first_head) * width * page_size + offsets[first + j];
  for (int at = threadIdx.x / N_TOKENS; at < here; at += blockDim.x / N_TOKENS)
    to[(at / d * width + at % d) * page_size] = narrow<T>(turned[at * (N_TOKENS + 1) + j]);
}

template <class T, int N>
__global__ void swiglu(const T* gate_up, T* out, integer f) {
  const T* gate = gate_up + 2 * f * blockIdx.x;
  for (integer i = N * threadIdx.x; i < f; i += N * blockDim.x) {
    Pack<T, N> g = load<T, N>(gate + i), u = load<T, N>(gate + f + i), y;
    for (int j = 0; j < N; ++j) {
      float v = wide(g.at[j]);
      y.at[j] = narrow<T>(v / (1.0f + expf(-v)) * wide(u.at[j]));
    }
    store<T, N>(out + f * blockIdx.x + i, y);
  }
}

// One block of 1024 threads per row.
__global__ void __launch_bounds__(1024, 1)
greedy(const float* logits, integer* tokens, integer* copy, float* logprobs, integer vocab) {
  __shared__ float peaks[32];
  __shared__ integer ids[32];
  const float* row = logits + blockIdx.x * vocab;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float infinity = __int_as_float(0x7f800000);
  float best = -infinity;
  integer at = vocab - 1;
  for (integer i = threadIdx.x; i < vocab; i += 1024)
    if (row[i] > best) { best = row[i]; at = i; }
  for (int round = 0; round < 2; ++round) {
    for (int step = 16; step; step /= 2) {
      float other = __shfl_xor_sync(0xffffffffu, best, step);
      integer where = __shfl_xor_sync(0xffffffffu, at, step);
      if (other > best || (other == best && where < at)) { best = other; at = where; }
    }
    if (round == 0) {
      if (lane == 0) { peaks[warp] = best; ids[warp] = at; }
      __syncthreads();
      best = peaks[lane];
      at = ids[lane];
    }
  }
  float sum = 0.0f;
  for (integer i = threadIdx.x; i < vocab; i += 1024) sum = sum + expf(row[i] - best);
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    tokens[blockIdx.x] = at;
    if (copy) copy[blockIdx.x] = at;
    logprobs[blockIdx.x] = fabsf(best) < infinity ? -logf(sum) : __int_as_float(0x7fc00000);
  }
}
""".replace("N_TOKENS", str(TOKENS)).replace("N_KEPT", str(KEPT))
