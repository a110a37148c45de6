// SPDX-License-Identifier: Apache-2.0
// topk_softmax: the topk largest softmax probabilities of each token and their experts. One warp takes one token.
//
// Constants put in front of this text:
//   In          Half | Bfloat16 | float
//   VALUES      logits per lane: ceil(experts / 32)

constexpr float LOWEST = -3.402823466e38f;

extern "C" __global__ void topk_softmax(
    const In* __restrict__ gating,            // (tokens, experts) logits
    long long gating_pitch,
    int tokens,
    int experts,
    int topk,
    int renormalize,                          // the chosen weights are divided by their sum
    float* __restrict__ topk_weights,         // (tokens, topk)
    int* __restrict__ topk_ids)               // (tokens, topk)
{
    wait_for_previous_kernel();
    const int lane = threadIdx.x % LANES;
    const int token = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (token >= tokens) return;

    // Lane l holds experts l, l + 32, ...; NaN counts as the lowest logit, infinities as the largest finite ones.
    float logit[VALUES];
    float largest = LOWEST;
#pragma unroll
    for (int i = 0; i < VALUES; ++i) {
        const int expert = i * LANES + lane;
        logit[i] = expert < experts ? to_float(gating[token * gating_pitch + expert]) : LOWEST;
        logit[i] = fminf(fmaxf(logit[i], LOWEST), -LOWEST);
        largest = fmaxf(largest, logit[i]);
    }
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUES; ++i)
        if (i * LANES + lane < experts) sum += expf(logit[i] - largest);
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, offset);

    u32 taken = 0;  // bit i: this lane's value i has been chosen
    static_assert(VALUES <= 32, "one bit of `taken` per value");
    float chosen_sum = 0.0f;
    for (int slot = 0; slot < topk; ++slot) {
        float best = LOWEST;
        int best_expert = experts;  // larger than any: loses every tie
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            const int expert = i * LANES + lane;
            if (expert >= experts || (taken >> i & 1)) continue;
            if (best_expert == experts || logit[i] > best) best = logit[i], best_expert = expert;
        }
        for (int offset = LANES / 2; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(FULL_WARP, best, offset);
            const int other_expert = __shfl_xor_sync(FULL_WARP, best_expert, offset);
            const bool better = other > best || (other == best && other_expert < best_expert);
            if (other_expert < experts && (better || best_expert == experts)) best = other, best_expert = other_expert;
        }
        if (best_expert % LANES == lane) taken |= 1u << (best_expert / LANES);
        const float probability = expf(best - largest) / sum;
        chosen_sum += probability;
        if (lane == 0) {
            topk_weights[(long long)token * topk + slot] = probability;
            topk_ids[(long long)token * topk + slot] = best_expert;
        }
    }
    if (renormalize && lane == 0)
        for (int slot = 0; slot < topk; ++slot) topk_weights[(long long)token * topk + slot] /= chosen_sum;
}
