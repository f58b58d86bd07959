"""The CUDA C++ of the row kernels that follow routes: gate, sort, pack, the tables of an expert call, combine.

They come behind `cuda_source.SOURCE`.
"""

WORDS = 240  # that a launch takes along

SOURCE = r"""
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

// One block of 1024 threads per cover: it counts the pairs of smaller covers, then places its own in their order. A
// warp has pairs that lie behind each other.
__global__ void __launch_bounds__(1024, 1)
sort_pairs(const int* experts, const integer* turns, const int* cover_of, const int* n_replicas, int* tokens,
           int* places, integer* counts, integer n, integer top_k, integer most, integer layer, const Header* headers,
           char* packed, integer row) {
  __shared__ int less[32], same[32], ahead[32];
  const Header header = headers ? headers[blockIdx.x] : Header{0, 0, 0};
  const int mine = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = static_cast<int>(top_k);
  const int share = (static_cast<int>(n) + 1023) / 1024 * 32, begin = warp * share;
  const int end = min(static_cast<int>(n), begin + share);
  auto cover = [&](int i) {  // replicas take turns; what belongs to no token has none
    const integer turn = turns[i / k];
    if (turn < 0) return 0x7fffffff;
    const int e = experts[i];
    return cover_of[e * most + (most > 1 ? (turn + layer) % n_replicas[e] : 0)];
  };
  int l = 0, s = 0, a = 0;
#pragma unroll 4
  for (int i = begin + lane; i < end; i += 32) {
    const int c = cover(i);
    l += c < mine;
    s += c == mine;
    a += c < header.first;
    if (mine == 0 && c == 0x7fffffff) places[i] = -1;
  }
  l = __reduce_add_sync(0xffffffffu, l);
  s = __reduce_add_sync(0xffffffffu, s);
  a = __reduce_add_sync(0xffffffffu, a);
  if (lane == 0) { less[warp] = l; same[warp] = s; ahead[warp] = a; }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int count = __reduce_add_sync(0xffffffffu, same[lane]);
    const int first_row = __reduce_add_sync(0xffffffffu, ahead[lane]) + header.rows;  // of those for this rank
    if (lane == 0) {
      counts[mine] = count;
      if (header.bytes) reinterpret_cast<int*>(packed + first_row * row - header.bytes)[mine - header.first] = count;
    }
  }
  if (s == 0) return;
  int place = header.rows + __reduce_add_sync(0xffffffffu, less[lane] + (lane < warp ? same[lane] : 0));
#pragma unroll 4
  for (int i = begin; i < end; i += 32) {
    const bool here = i + lane < end && cover(i + lane) == mine;
    const unsigned votes = __ballot_sync(0xffffffffu, here);
    if (here) {
      const int at = place + __popc(votes & ((1u << lane) - 1u));
      if (tokens) tokens[at] = (i + lane) / k;
      places[i + lane] = at;
    }
    place += __popc(votes);
  }
}

template <class T, int N>
__global__ void gather(const T* rows, const int* tokens, T* out, integer d) {
  const T* from = rows + tokens[blockIdx.x] * d;
  T* to = out + blockIdx.x * d;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) store<T, N>(to + i, load<T, N>(from + i));
}

template <class T, int N>
__global__ void scatter(const T* rows, const int* places, T* out, integer top_k, integer d) {
  const int* place = places + blockIdx.x * top_k;
  if (place[0] < 0) return;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    const Pack<T, N> x = load<T, N>(rows + blockIdx.x * d + i);
    for (integer begin = 0; begin < top_k; begin += 8) {  // places first: they might be what is written
      integer to[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) to[k] = begin + k < top_k ? place[begin + k] : -1;
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (to[k] >= 0) store<T, N>(out + to[k] * d + i, x);
    }
  }
}

template <class T, class A, int N>
__global__ void combine(const T* x, const A* answers, const int* places, const float* weights, T* out, integer top_k,
                        integer d) {
  const int* place = places + blockIdx.x * top_k;
  const float* weight = weights + blockIdx.x * top_k;
  const integer n = place[0] < 0 ? 0 : top_k;
  for (integer i = N * threadIdx.x; i < d; i += N * blockDim.x) {
    Pack<T, N> residual = load<T, N>(x + blockIdx.x * d + i), y;
    float total[N] = {};
    for (integer k = 0; k < n; ++k) {
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

// Words that come with the launch: nothing of the host is read later.
struct Words { integer at[N_WORDS]; };

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
""".replace("N_WORDS", str(WORDS))
