"""The CUDA C++ of the row kernels. Launched by `moempi.device.cuda_rows`, which says what goes in and out."""

WORDS = 240  # that a launch takes along
TOKENS = 16  # whose heads a block turns

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

template <class T, int N> __device__ inline Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N> __device__ inline void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
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

// Words that come with the launch: nothing of the host is read later.
struct Words { integer at[N_WORDS]; };

// 1 / root mean square of a row, N values of it by a thread at a time: the order of the sum follows from d alone.
template <class T, int N>
__device__ inline float norm_factor(const T* row, integer d, float eps) {
  float squares = 0.0f;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    const Pack<T, N> x = load<T, N>(row + i);
    for (int j = 0; j < N; ++j) squares = squares + wide(x.at[j]) * wide(x.at[j]);
  }
  return rsqrtf(block_sum(squares) / d + eps);
}

template <class T, class O, int N>
__device__ inline void scale_row(const T* row, float factor, const float* weight, O* out, integer d) {
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    const Pack<T, N> x = load<T, N>(row + i);
    Pack<O, N> y;
    for (int j = 0; j < N; ++j) y.at[j] = narrow<O>(wide(x.at[j]) * factor * weight[i + j]);
    store<O, N>(out + i, y);
  }
}

template <class T, class O, int N>
__global__ void rms_norm(const T* x, const float* weight, O* out, integer heads, integer d, float eps) {
  const T* row = x + blockIdx.x * d;
  const float factor = norm_factor<T, N>(row, d, eps);
  scale_row<T, O, N>(row, factor, weight + blockIdx.x % heads * d, out + blockIdx.x * d, d);
}

// Sums of two integers over a block of whole warps; the same on all threads.
__device__ inline void block_sums(integer& x, integer& y) {
  __shared__ integer parts[2][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int step = 16; step; step /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, step);
    y += __shfl_xor_sync(0xffffffffu, y, step);
  }
  if (lane == 0) { parts[0][warp] = x; parts[1][warp] = y; }
  __syncthreads();
  x = y = 0;
  for (int i = 0; i < warps; ++i) { x += parts[0][i]; y += parts[1][i]; }
  __syncthreads();
}

// A block per slot and batch. Between the two products rows lie slot by slot, so that a tile has those of all batches.
__global__ void row_tables(const integer* in_memory, integer* tiles, integer* inward, integer* outward,
                           integer room, integer n_batches, integer n_slots, integer tile, integer row,
                           const __grid_constant__ Words taken_along) {
  const integer slot = blockIdx.x / n_batches, batch = blockIdx.x % n_batches;
  const integer* batches = in_memory ? in_memory : taken_along.at;
  auto count = [&](integer b, integer s) -> integer {
    const integer counts = batches[3 * b + 2];
    return n_slots == 1 ? counts : reinterpret_cast<const int*>(counts)[s];
  };
  integer before = 0, skipped = 0;  // rows of smaller slots, and of this one in smaller batches; in this batch
  integer tiles_before = 0, all_tiles = 0;
  for (integer s = threadIdx.x; s < n_slots; s += blockDim.x) {
    integer rows = 0, up_to_here = 0;
    for (integer b = 0; b < n_batches; ++b) {
      rows += count(b, s);
      if (b < batch) up_to_here += count(b, s);
    }
    const integer of_slot = (rows + tile - 1) / tile;
    all_tiles += of_slot;
    if (s < slot) { before += rows; tiles_before += of_slot; skipped += count(batch, s); }
    if (s == slot) before += up_to_here;
  }
  block_sums(before, skipped);
  block_sums(tiles_before, all_tiles);
  const integer mine = count(batch, slot);
  for (integer i = threadIdx.x; i < mine; i += blockDim.x) {
    inward[before + i] = batches[3 * batch] + (skipped + i) * row;
    outward[before + i] = batches[3 * batch + 1] + (skipped + i) * row;
  }
  if (batch != 0) return;
  integer rows = 0;
  for (integer b = 0; b < n_batches; ++b) rows += count(b, slot);
  for (integer i = threadIdx.x; i * tile < rows; i += blockDim.x) {
    integer* to = tiles + 3 * (tiles_before + i);
    to[0] = rows - i * tile;
    to[1] = before + i * tile;
    to[2] = slot;
  }
  if (slot == 0)
    for (integer i = all_tiles + threadIdx.x; i < room; i += blockDim.x) tiles[3 * i] = 0;
}

// Residual and the rows that are added to it, [T, D]; then the RMS norm of their sum, as `rms_norm` has it.
template <class T, int N>
__global__ void add_norm(const T* residual, const T* rows, const float* weight, T* sum, T* normed, integer d,
                         float eps) {
  const integer begin = blockIdx.x * d;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    const Pack<T, N> a = load<T, N>(residual + begin + i), b = load<T, N>(rows + begin + i);
    Pack<T, N> y;
    for (int j = 0; j < N; ++j) y.at[j] = narrow<T>(wide(a.at[j]) + wide(b.at[j]));
    store<T, N>(sum + begin + i, y);
  }
  // A thread reads again what it has written itself.
  const float factor = norm_factor<T, N>(sum + begin, d, eps);
  scale_row<T, T, N>(sum + begin, factor, weight, normed + begin, d);
}

// One block per N_TOKENS tokens and head, of queries, then keys, then values. Queries and keys are normed and turned.
// Keys lie position beside position in the cache: they are written so, out of what the block has of them.
template <class T>
__global__ void turn_heads(const T* rows, const float* norm, const float* cosines, const float* sines,
                           const integer* positions, const integer* pages, const integer* offsets, float* queries,
                           T* keys, T* values, integer tokens, integer heads, integer kv_heads, integer dim,
                           integer width, integer page_size, float eps) {
  extern __shared__ float turned[];  // [dim, N_TOKENS + 1], of keys
  const integer all = heads + 2 * kv_heads, first = blockIdx.x / all * N_TOKENS, h = blockIdx.x % all, half = dim / 2;
  const int lane = threadIdx.x % 32, n = static_cast<int>(min(tokens - first, static_cast<integer>(N_TOKENS)));
  const integer kv = (h - heads) % kv_heads;
  for (int j = threadIdx.x / 32; j < n; j += blockDim.x / 32) {
    const integer t = first + j;
    const T* row = rows + (t * all + h) * dim;
    if (h >= heads + kv_heads) {
      T* to = values + ((pages[t] * kv_heads + kv) * page_size + offsets[t]) * width;
      for (integer i = lane; i < dim; i += 32) to[i] = row[i];
      continue;
    }
    float squares = 0.0f;
    for (integer i = lane; i < dim; i += 32) { float v = wide(row[i]); squares = squares + v * v; }
    const float factor = rsqrtf(warp_sum(squares) / dim + eps);
    const float* scale = norm + h * dim;
    const float* cosine = cosines + positions[t] * dim;
    const float* sine = sines + positions[t] * dim;
    for (integer low = lane; low < half; low += 32) {
      const integer high = low + half;
      const float x = wide(row[low]) * factor * scale[low], y = wide(row[high]) * factor * scale[high];
      const float turned_low = x * cosine[low] + y * sine[low], turned_high = y * cosine[high] + x * sine[high];
      if (h < heads) {
        queries[(t * heads + h) * dim + low] = turned_low;
        queries[(t * heads + h) * dim + high] = turned_high;
      } else {
        turned[low * (N_TOKENS + 1) + j] = turned_low;
        turned[high * (N_TOKENS + 1) + j] = turned_high;
      }
    }
  }
  if (h < heads || h >= heads + kv_heads) return;
  __syncthreads();
  for (int i = threadIdx.x; i < dim * N_TOKENS; i += blockDim.x) {
    const int j = i % N_TOKENS, at = i / N_TOKENS;
    if (j >= n) continue;
    T* to = keys + (pages[first + j] * kv_heads + kv) * width * page_size + offsets[first + j];
    to[at * page_size] = narrow<T>(turned[at * (N_TOKENS + 1) + j]);
  }
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

template <class T, int N>
__global__ void gather(const T* rows, const int* pairs, T* out, integer top_k, integer d) {
  if (pairs[blockIdx.x] < 0) return;
  const T* from = rows + pairs[blockIdx.x] / static_cast<int>(top_k) * d;
  T* to = out + blockIdx.x * d;
#pragma unroll 4
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) store<T, N>(to + i, load<T, N>(from + i));
}

template <class T, class A, int N>
__global__ void combine(const T* x, const A* answers, const int* places, const float* weights, T* out, integer top_k,
                        integer d) {
  const int* place = places + blockIdx.x * top_k;
  const float* weight = weights + blockIdx.x * top_k;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    Pack<T, N> residual = load<T, N>(x + blockIdx.x * d + i), y;
    float total[N] = {};
    for (integer k = 0; place[0] >= 0 && k < top_k; ++k) {
      Pack<A, N> answer = load<A, N>(answers + place[k] * d + i);
      float w = weight[k];
      for (int j = 0; j < N; ++j) {
        float term = wide(answer.at[j]) * w;
        total[j] = k ? total[j] + term : term;
      }
    }
    for (int j = 0; j < N; ++j) y.at[j] = narrow<T>(wide(residual.at[j]) + total[j]);
    store<T, N>(out + blockIdx.x * d + i, y);
  }
}

// One warp per token.
__global__ void choose(const float* logits, int* experts, float* weights, integer tokens, integer n_experts,
                       integer top_k, integer normalize) {
  extern __shared__ float shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const integer t = static_cast<integer>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (t >= tokens) return;
  float* score = shared + warp * n_experts;
  float peak = -__int_as_float(0x7f800000);
  for (integer e = lane; e < n_experts; e += 32) {
    score[e] = logits[t * n_experts + e];
    peak = fmaxf(peak, score[e]);
  }
  for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, step));
  float sum = 0.0f;
  for (integer e = lane; e < n_experts; e += 32) { score[e] = expf(score[e] - peak); sum = sum + score[e]; }
  sum = warp_sum(sum);
  for (integer e = lane; e < n_experts; e += 32) score[e] = score[e] / sum;
  __syncwarp();
  float total = 0.0f;
  for (integer k = 0; k < top_k; ++k) {
    float best = -1.0f;
    int at = static_cast<int>(n_experts) - 1;
    for (integer e = lane; e < n_experts; e += 32)
      if (score[e] > best) { best = score[e]; at = static_cast<int>(e); }
    for (int step = 16; step; step /= 2) {
      float other = __shfl_xor_sync(0xffffffffu, best, step);
      int where = __shfl_xor_sync(0xffffffffu, at, step);
      if (other > best || (other == best && where < at)) { best = other; at = where; }
    }
    if (lane == 0) { experts[t * top_k + k] = at; weights[t * top_k + k] = best; score[at] = -2.0f; }
    total = k ? total + best : best;
    __syncwarp();
  }
  if (normalize)
    for (integer k = lane; k < top_k; k += 32) weights[t * top_k + k] = weights[t * top_k + k] / total;
}

// What lies ahead of the rows of a cover's rank: the first of its covers, how many rows all headers take up to its own,
// how many bytes its own has.
struct Header { int first, rows, bytes; };

// One block of 1024 threads per cover: it counts the pairs of smaller covers, then places its own in their order.
__global__ void sort_pairs(const int* experts, const integer* turns, const int* cover_of, const int* n_replicas,
                           int* pairs, int* places, integer* counts, integer n, integer top_k, integer most,
                           integer layer, const Header* headers, integer per_header, char* packed, integer row) {
  __shared__ int less[32], same[32], ahead[32];
  const Header header = headers ? headers[blockIdx.x] : Header{0, 0, 0};
  const integer all_headers = headers ? headers[gridDim.x - 1].rows : 0;
  const int mine = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = static_cast<int>(top_k);
  auto cover = [&](integer i) {  // replicas take turns; what belongs to no token comes behind all
    const integer turn = turns[static_cast<int>(i) / k];
    if (turn < 0) return 0x7fffffff;
    const int e = experts[i];
    return cover_of[e * most + (most > 1 ? (turn + layer) % n_replicas[e] : 0)];
  };
  int l = 0, s = 0, a = 0;
  for (integer i = threadIdx.x; i < n; i += 1024) {
    const int c = cover(i);
    l += c < mine;
    s += c == mine;
    a += c < header.first;
    if (mine == 0 && c == 0x7fffffff) pairs[all_headers + i] = places[i] = -1;
  }
  l = __reduce_add_sync(0xffffffffu, l);
  s = __reduce_add_sync(0xffffffffu, s);
  a = __reduce_add_sync(0xffffffffu, a);
  if (lane == 0) { less[warp] = l; same[warp] = s; ahead[warp] = a; }
  __syncthreads();
  int base = __reduce_add_sync(0xffffffffu, less[lane]) + header.rows;
  const int count = __reduce_add_sync(0xffffffffu, same[lane]);
  const int first_row = __reduce_add_sync(0xffffffffu, ahead[lane]) + header.rows;  // of those for this rank
  if (threadIdx.x == 0) {
    counts[mine] = count;
    if (header.bytes) reinterpret_cast<int*>(packed + first_row * row - header.bytes)[mine - header.first] = count;
  }
  if (headers && mine == header.first)
    for (integer i = threadIdx.x; i < per_header; i += 1024) pairs[first_row - 1 - i] = -1;
  if (count == 0) return;
  for (integer begin = 0; begin < n; begin += 1024) {
    const integer i = begin + threadIdx.x;
    const bool here = i < n && cover(i) == mine;
    const unsigned votes = __ballot_sync(0xffffffffu, here);
    __syncthreads();
    if (lane == 0) same[warp] = __popc(votes);
    __syncthreads();
    const int before = __reduce_add_sync(0xffffffffu, lane < warp ? same[lane] : 0);
    const int all = __reduce_add_sync(0xffffffffu, same[lane]);
    if (here) {
      const int place = base + before + __popc(votes & ((1u << lane) - 1u));
      pairs[place] = static_cast<int>(i);
      places[i] = place;
    }
    base += all;
  }
}

// One block of 1024 threads per row.
__global__ void greedy(const float* logits, integer* tokens, float* logprobs, integer vocab) {
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
    logprobs[blockIdx.x] = fabsf(best) < infinity ? -logf(sum) : __int_as_float(0x7fc00000);
  }
}
""".replace("N_WORDS", str(WORDS)).replace("N_TOKENS", str(TOKENS))
