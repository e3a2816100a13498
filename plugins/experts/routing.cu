// Which experts a token takes, and the order of tokens by expert; rules as vl2.model.moe.choose_experts.
#include "device.cuh"

static constexpr int TOKENS_PER_BLOCK = 4, VALUES = 8;  // a warp a token, a lane up to 8 of at most 256 experts
enum RoutingFlags { SIGMOID = 1, BIASED = 2, NORMALISED = 4 };

// Larger for larger scores, NaN largest, of equal ones the lower index: a total order, so a choice is always valid.
DEVICE wide_t rank_of(float score, int index) {
  unsigned bits = float_to_bits(score == 0.0f ? 0.0f : score);
  unsigned key = score != score ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<wide_t>(key) << 32 | static_cast<unsigned>(~index);
}
DEVICE int index_of(wide_t rank) { return static_cast<int>(~static_cast<unsigned>(rank)); }

DEVICE void score_experts(const float* logits, float* scores, int experts, bool sigmoid) {
  const int lane = threadIdx.x % 32;
  float largest = bits_to_float(0xff800000u), sum = 0.0f;
  for (int e = lane; e < experts; e += 32) largest = fmaxf(largest, logits[e]);
  largest = max_lanes<32>(largest);
  for (int e = lane; e < experts; e += 32) {
    scores[e] = sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - largest);
    sum += scores[e];
  }
  sum = sum_lanes<32>(sum);
  if (!sigmoid)
    for (int e = lane; e < experts; e += 32) scores[e] /= sum;
}

// The value of one group: its best expert, or with a correction bias the sum of its best two.
DEVICE float group_value(const float* choice, int size, bool biased) {
  wide_t first = 0, second = 0;
  for (int i = 0; i < size; i++) {
    wide_t rank = rank_of(choice[i], i);
    if (rank > first) { second = first; first = rank; }
    else if (rank > second) second = rank;
  }
  return choice[index_of(first)] + (biased ? choice[index_of(second)] : 0.0f);
}

// Experts of dropped groups count 0, not -inf, as in the original; a lane a group.
DEVICE void drop_groups(float* choice, int experts, int groups, int kept, bool biased) {
  const int lane = threadIdx.x % 32, size = experts / groups;
  wide_t mine = lane < groups ? rank_of(group_value(choice + lane * size, size, biased), lane) : 0;
  bool keep = false;
  for (int i = 0; i < kept; i++) {
    wide_t best = max_lanes(keep ? 0 : mine);
    keep = keep || best == mine;
  }
  if (lane < groups && !keep)
    for (int i = 0; i < size; i++) choice[lane * size + i] = 0.0f;
}

// logits [N, E] → idx [N, k], weights [N, k]
KERNEL(128) vl2_route(const float* __restrict__ logits, const float* __restrict__ bias, int* __restrict__ idx,
                      float* __restrict__ weights, int tokens, int experts, int top_k, int groups, int kept_groups, int flags,
                      float scaling) {
  SHARED(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.x * TOKENS_PER_BLOCK + warp;
  float* scores = reinterpret_cast<float*>(memory) + warp * 2 * experts;
  float* choice = scores + experts;
  if (token >= tokens) return;
  score_experts(logits + static_cast<long long>(token) * experts, scores, experts, flags & SIGMOID);
  for (int e = lane; e < experts; e += 32) choice[e] = scores[e] + (flags & BIASED ? bias[e] : 0.0f);
  __syncwarp();
  if (groups != kept_groups) drop_groups(choice, experts, groups, kept_groups, flags & BIASED);
  __syncwarp();
  wide_t ranks[VALUES];
#pragma unroll
  for (int i = 0; i < VALUES; i++) ranks[i] = lane + 32 * i < experts ? rank_of(choice[lane + 32 * i], lane + 32 * i) : 0;
  float sum = 0.0f, mine = 0.0f;
  int chosen = 0;
  for (int j = 0; j < top_k; j++) {
    wide_t best = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++) best = ranks[i] > best ? ranks[i] : best;
    best = max_lanes(best);
#pragma unroll
    for (int i = 0; i < VALUES; i++) ranks[i] = ranks[i] == best ? 0 : ranks[i];
    const int e = index_of(best);
    // The correction bias chooses but does not weight; a dropped group's expert weighs 0 without one.
    const float weight = flags & BIASED ? scores[e] : choice[e];
    sum += weight;
    if (lane == j) mine = weight, chosen = e;
  }
  if (lane >= top_k) return;
  if (flags & NORMALISED && top_k > 1) mine /= sum + 1e-20f;
  idx[static_cast<long long>(token) * top_k + lane] = chosen;
  weights[static_cast<long long>(token) * top_k + lane] = mine * scaling;
}
EXPORT(vl2_route)

// idx [N, k] → for the choices in the order of experts, stable: source (token) and target (row n · slots + j) [N·k], and
// offsets [E + 1]. A block an expert: it counts the choices before its own, so that nothing is atomic or depends on order.
KERNEL(256) vl2_sort(const int* __restrict__ idx, int* __restrict__ source, int* __restrict__ target, int* __restrict__ offsets,
                     int choices, int top_k, int slots) {
  SHARED(memory);
  int* counts = reinterpret_cast<int*>(memory);
  const int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32, expert = blockIdx.x;
  int before = 0;
  for (int i = thread; i < choices; i += threads) before += idx[i] < expert;
  counts[thread] = before;
  __syncthreads();
  int start = 0;
  for (int i = 0; i < threads; i++) start += counts[i];
  __syncthreads();
  if (thread == 0) offsets[expert] = start;
  if (thread == 0 && expert == static_cast<int>(gridDim.x) - 1) offsets[expert + 1] = choices;
  for (int first = 0; first < choices; first += threads) {
    const int i = first + thread;
    const bool match = i < choices && idx[i] == expert;
    const unsigned matches = warp_ballot(match);
    if (lane == 0) counts[warp] = __popc(matches);
    __syncthreads();
    int at = start;
    for (int w = 0; w < threads / 32; w++) {
      if (w < warp) at += counts[w];
      start += counts[w];
    }
    if (match) {
      at += __popc(matches & ((1u << lane) - 1));
      source[at] = i / top_k;
      target[at] = i / top_k * slots + i % top_k;
    }
    __syncthreads();
  }
}
EXPORT(vl2_sort)
