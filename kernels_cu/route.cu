// SPDX-License-Identifier: Apache-2.0
// Routing: a stable counting sort of the (token, slot) pairs by expert, and every table that depends on it.
//
// A block takes a stretch of pairs, each of its warps a consecutive part. Counting: each warp counts its pairs per expert
// in its own row of a shared table. Prefix: a column of the table becomes the first position of each warp. Placing: each
// warp goes through its pairs again and hands out positions in order. Few pairs take one launch (`route`), of a block or
// of a cluster; more take two (`route_count`, `route_place`), which are the same steps with a prefix over blocks in
// between. routing.cuh has the other half of the code.
//
// Constants put in front of this text, beside that of routing.cuh:
//   CLUSTER     blocks of `route`, at most 8; more than one from compute capability 9.0 on

// Shared: a row of counts per warp, then three numbers per expert. An odd pitch keeps columns free of bank conflicts.
extern __shared__ int table[];
__device__ __forceinline__ int pitch_of(int experts) { return experts | 1; }
__device__ __forceinline__ int* per_expert(int experts) { return table + blockDim.x / LANES * pitch_of(experts); }

// Calls visit(pair, expert, lanes of this warp with the same expert) for each pair of this warp, 32 at a time, in order.
template <typename Visit>
__device__ __forceinline__ void for_pairs_of_warp(const Shape& shape, int begin, int end, Visit visit) {
    const int warps = blockDim.x / LANES, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int span = ((end - begin + warps - 1) / warps + LANES - 1) / LANES * LANES;
    const int stop = min(begin + (warp + 1) * span, end);
    for (int i = begin + warp * span; i < stop; i += LANES) {
        const int pair = i + lane;
        const int expert = pair < stop ? local_expert(shape, shape.ids[pair]) : -1;
        const u32 same = __match_any_sync(FULL_WARP, expert);
        visit(pair, expert, same);
        __syncwarp();
    }
}

// The table's counts, turned into the position of each warp's first pair among the block's pairs of that expert;
// per_expert becomes the block's number of pairs of each expert. `meanwhile` is called while the others load theirs.
template <typename Call>
__device__ __forceinline__ void count_pairs(const Shape& shape, int begin, int end, Call meanwhile) {
    const int warps = blockDim.x / LANES, warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int pitch = pitch_of(shape.experts);
    for (int i = threadIdx.x; i < warps * pitch; i += blockDim.x) table[i] = 0;
    __syncthreads();
    meanwhile();
    int* mine = table + warp * pitch;
    for_pairs_of_warp(shape, begin, end, [&](int, int expert, u32 same) {
        if (expert >= 0 && lane == __ffs(same) - 1) mine[expert] += __popc(same);
    });
    __syncthreads();
    for (int expert = threadIdx.x; expert < shape.experts; expert += blockDim.x) {
        int before = 0;
#pragma unroll 4
        for (int i = 0; i < warps; ++i) {
            const int count = table[i * pitch + expert];
            table[i * pitch + expert] = before;
            before += count;
        }
        per_expert(shape.experts)[expert] = before;
    }
    __syncthreads();
}

// Places the pairs; `first` holds the row of the block's first pair of each expert.
__device__ __forceinline__ void place_pairs(const Shape& shape, int begin, int end, const int* first, int* dst2src_map,
                                            int* src2dst_map, int* row_experts) {
    const int lane = threadIdx.x % LANES;
    int* mine = table + threadIdx.x / LANES * pitch_of(shape.experts);
    for_pairs_of_warp(shape, begin, end, [&](int pair, int expert, u32 same) {
        int row = -1;
        if (expert >= 0) row = first[expert] + mine[expert] + __popc(same & ((1u << lane) - 1));
        __syncwarp();
        if (expert >= 0 && lane == __ffs(same) - 1) mine[expert] += __popc(same);
        if (pair >= end) return;
        if (row >= 0) {
            dst2src_map[row] = pair / shape.topk;
            row_experts[row] = expert;
        }
        src2dst_map[pair] = row;
    });
}

// From the counts of all blocks to everything that depends on them: `first` holds how many pairs of each expert come before
// the block's, and becomes the rows of those.
__device__ __forceinline__ void place(const Shape& shape, int begin, int end, int* first, const int* of_all, int blocks,
                                      const Results& to, const Tables& tables, Span* spans) {
    place_experts(shape, of_all, blocks, to, tables, spans, [&](int expert, int row) { first[expert] += row; });
    place_pairs(shape, begin, end, first, to.dst2src_map, to.src2dst_map, to.row_experts);
}

#if __CUDA_ARCH__ >= 900
#define IN_CLUSTER __cluster_dims__(CLUSTER)
#else
#define IN_CLUSTER
#endif

// All in one launch: of one block, or of a cluster of blocks that read each other's counts.
extern "C" __global__ void IN_CLUSTER route(
    const Id* ids, int pairs, int topk, int experts, const int* expert_map, int map_size, int* expert_offsets,
    int* expert_counts, int* dst2src_map, int* src2dst_map, int* row_experts, Tables tables, Span* spans)
{
    const int rank = blockIdx.x;
    only_wait_for_previous_kernel();
    forget_spans(spans, 0, rank == 0 ? experts : 0);
    const Shape shape = {ids, pairs, topk, experts, expert_map, map_size};
    const int pairs_per_block = (pairs + CLUSTER - 1) / CLUSTER;
    const int begin = min(rank * pairs_per_block, pairs), end = min(begin + pairs_per_block, pairs);
    count_pairs(shape, begin, end, start_kernels_behind);
    const int* mine = per_expert(experts);
    int* first = per_expert(experts) + pitch_of(experts);
    int* of_all = first + pitch_of(experts);
    if constexpr (CLUSTER > 1) sync_cluster();
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) {
        int before = 0, all = 0;
#pragma unroll
        for (int block = 0; block < CLUSTER; ++block) {
            const int count = CLUSTER > 1 ? load_of_block(mine + expert, block) : mine[expert];
            if (block < rank) before += count;
            all += count;
        }
        first[expert] = before;
        of_all[expert] = all;
    }
    if constexpr (CLUSTER > 1) arrive_at_cluster();
    const Results to = {expert_offsets, expert_counts, dst2src_map, src2dst_map, row_experts};
    place(shape, begin, end, first, of_all, CLUSTER, to, tables, spans);
    if constexpr (CLUSTER > 1) wait_for_cluster();  // the others have read this block's counts
}

// block_counts[block][expert] for the stretch of each block.
extern "C" __global__ void route_count(
    const Id* ids, int pairs, int topk, int experts, const int* expert_map, int map_size, int pairs_per_block,
    int* block_counts, Span* spans)
{
    only_wait_for_previous_kernel();
    forget_spans(spans, 0, blockIdx.x == 0 ? experts : 0);
    const Shape shape = {ids, pairs, topk, experts, expert_map, map_size};
    const int first = blockIdx.x * pairs_per_block;
    count_pairs(shape, first, min(first + pairs_per_block, pairs), start_kernels_behind);
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x)
        block_counts[(long long)blockIdx.x * experts + expert] = per_expert(experts)[expert];
}

// Each block adds up the counts itself: those of all blocks to the first rows of the experts, those of the blocks before it
// to where its own pairs begin.
extern "C" __global__ void route_place(
    const Id* ids, int pairs, int topk, int experts, const int* expert_map, int map_size, int pairs_per_block,
    const int* block_counts, int* expert_offsets, int* expert_counts, int* dst2src_map, int* src2dst_map,
    int* row_experts, Tables tables, Span* spans)
{
    const Shape shape = {ids, pairs, topk, experts, expert_map, map_size};
    const int begin = blockIdx.x * pairs_per_block;
    const int end = min(begin + pairs_per_block, pairs);
    count_pairs(shape, begin, end, [] {});  // the ids are older than route_count
    wait_for_previous_kernel();

    int* first = per_expert(experts);
    int* of_all = first + pitch_of(experts);
    for (int expert = threadIdx.x; expert < experts; expert += blockDim.x) first[expert] = of_all[expert] = 0;
    __syncthreads();
    const u32 counts = gridDim.x * experts, before = blockIdx.x * experts;
    constexpr int IN_FLIGHT = 8;
    for (u32 base = threadIdx.x; base < counts; base += IN_FLIGHT * blockDim.x) {
        int count[IN_FLIGHT];
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; ++j) {
            const u32 i = base + j * blockDim.x;
            count[j] = i < counts ? block_counts[i] : 0;
        }
#pragma unroll
        for (int j = 0; j < IN_FLIGHT; ++j) {
            const u32 i = base + j * blockDim.x, expert = i % experts;
            if (count[j] == 0) continue;
            atomicAdd(of_all + expert, count[j]);
            if (i < before) atomicAdd(first + expert, count[j]);
        }
    }
    __syncthreads();
    const Results to = {expert_offsets, expert_counts, dst2src_map, src2dst_map, row_experts};
    place(shape, begin, end, first, of_all, gridDim.x, to, tables, spans);
}

// The padded form: expert e's rows are e * max_tokens + (0 .. expert_num_tokens[e] - 1), already in place.
extern "C" __global__ void route_padded(
    const Id* expert_num_tokens, int experts, int max_tokens, int* expert_counts, int* src2dst_map, int* row_experts,
    Tables tables, Span* spans)
{
    const int expert = blockIdx.x;
    only_wait_for_previous_kernel();
    forget_spans(spans, expert, expert + 1);
    start_kernels_behind();
    const int count = int(max(Id(0), min(Id(max_tokens), expert_num_tokens[expert])));
    for (int i = threadIdx.x; i < max_tokens; i += blockDim.x) {
        const int row = expert * max_tokens + i;
        src2dst_map[row] = i < count ? row : -1;
        row_experts[row] = i < count ? expert : -1;
    }
    __syncthreads();  // the span was unknown before
    if (threadIdx.x == 0) write_expert(expert, experts, expert * max_tokens, count, spans, expert_counts, tables);
}
